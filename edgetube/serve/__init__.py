"""A server around one model: a page that shows live sources, REST for files, and a WebSocket for frames."""
