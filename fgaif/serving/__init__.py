"""The reward models as a service: messages, web application, page, client. Imports no Ray."""
