"""The llama-servers: one over HTTP, and one that is started here."""
