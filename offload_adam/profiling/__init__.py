"""Profile of a training run: where its time and its memory go.

session    records spans and memory samples on every rank, and collects them on rank 0; start here
sampler    thread that samples the memory
json_lines reads metrics.jsonl and memory.jsonl
profile    one rank's spans and samples, and `trace.json`
phases     resource and color of each span
lateness   divides waits for a collective into waits for a late rank and the transfer
diagnosis  what limits the run, and which setting to change
peak       what used the memory at its peak
charts     the figures of the report
report     `report.html`
"""
