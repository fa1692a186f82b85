"""The reward models as a web service: messages, application, page. Imports no Ray."""
