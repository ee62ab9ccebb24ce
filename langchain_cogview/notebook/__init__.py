"""Images in notebooks: outputs, galleries, the status line and HTML pages."""
