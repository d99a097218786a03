"""One adapter a peer, each with the same face as `bench.adapters.exact.ExactCache`."""
