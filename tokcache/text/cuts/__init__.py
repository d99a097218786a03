"""Where the texts of a tokenizer may be cut: the rules, a proof for each, and the plan of cuts."""
