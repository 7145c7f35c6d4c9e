"""The HTTP server of a bundle, `marnet-serve`; nothing else imports it."""
