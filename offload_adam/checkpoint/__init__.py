"""Checkpoints: each rank writes its shards, any world size loads them, and every byte is verified.

save         save_checkpoint: rank files, then one commit     --> rank_file, commit
background   begin_checkpoint: the same during training       --> save
load         load_checkpoint: into the state, in place        --> reader
export       to files of torch.save and torch.distributed     --> reader, torch_file
torch_import from files of torch.save                         --> rank_file, commit
dcp          the optimizer state for torch.distributed.checkpoint
format       manifest.json                                    --> encoding
"""
