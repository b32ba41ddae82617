"""What studies of probing share: the protocol of training and comparing probes, and figures."""
