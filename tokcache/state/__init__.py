"""Token ids to model states: blocks of KV state, found again by the tokens that made them."""
