"""BatchTopK: the batch's k N largest while training, a fresh threshold afterwards."""

ARCHITECTURE = "batchtopk"
