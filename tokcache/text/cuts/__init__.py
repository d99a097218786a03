"""Where texts may be cut for a tokenizer: the rules, the proof for each, and the plan of them."""
