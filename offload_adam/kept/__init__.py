"""The file in which a rank's optimizer state outlives its process.

file     KeptFile: the file's parts and records; start here
lock     the lock that its process holds
budget   sizes of the parts
pages    keeps later writes of this process from the file, also those of forked children
record   the content of a record: JSON values and arrays as bytes
space    takes the file's space from its file system
"""
