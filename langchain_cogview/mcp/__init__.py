"""An MCP server that makes images: the `cogview mcp` command (extra `mcp`). Nothing is imported before it is used."""
