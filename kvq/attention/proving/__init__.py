"""Whether a kernel is right and fast on this machine: trials, their verdicts, records shipped with kvq."""
