"""What can be measured: the machine, its bandwidths, perplexity of a text, speed of generation."""
