"""The file in which a rank's optimizer state outlives its process.

file            KeptFile: the file's parts and records; start here
holder          Holder: what holds the file while no process of the run does
folder, lock    a holder: a folder in shared memory, and the lock of a file in it
keeper_client   a holder: the keeper, as a rank sees it
keeper          the keeper's process
budget          sizes of the parts
pages           keeps later writes of this process from the file, also those of forked children
record          the content of a record: JSON values and arrays as bytes
space           takes the file's space from its file system
"""
