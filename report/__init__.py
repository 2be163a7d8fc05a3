import os

os.environ["MPLBACKEND"] = "agg"  # figures are files, whatever the user's notebooks draw with
