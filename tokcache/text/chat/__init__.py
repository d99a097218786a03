"""Chat templates: which of them only append text, and the rendering of new messages alone."""
