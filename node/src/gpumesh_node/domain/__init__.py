"""What the node decides, without I/O: parsing what engines say, the job machine, what a receipt record looks like."""
