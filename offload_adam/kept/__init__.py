"""The file in which a rank's optimizer state outlives its process.

file     KeptFile: the file's parts and records, and the lock that a process holds; start here
budget   sizes of the parts
pages    keeps later writes of this process from the file, also those of forked children
record   the content of a record: JSON values and arrays as bytes
space    takes the file's space from its file system
"""
