"""How fast this machine is at what nanomoe does, beside others who do the same work and the limit of its hardware."""
