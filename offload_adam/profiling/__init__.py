"""Where the memory and the time of a run go: samples, spans, a trace and a report."""
