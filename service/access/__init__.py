"""Who may use the service: owners, keys, quotas, sign-ins, and the audit of changes. Knows no job and no HTTP."""
