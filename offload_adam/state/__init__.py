"""The optimizer state in the forms that callers save and load.

boxes         the parts of a tensor that ranks hold and files contain
state_shard   one rank's range of each parameter's state, as plain tensors and for DCP; start here
load_plan     the checks and the copies that load a saved state
coded_tensor  a moment in 8-bit codes, as `optimizer.state` shows it
state_dict    the state dicts of `OffloadAdam` and of torch
state_edits   tensors that users assign in `optimizer.state`
"""
