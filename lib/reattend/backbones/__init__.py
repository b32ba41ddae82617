"""The shared models: real pretrained ones and the few that are trained here."""
