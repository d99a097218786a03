"""An endpoint in front of llama-servers that routes each request to the longest held prefix."""
