"""Where the files of jobs lie: a folder of this machine, or a bucket that speaks S3, behind one interface.

Knows no job, no checkpoint and no torch. What reaches a bucket is an extra (`s3`), imported when one is opened.
"""
