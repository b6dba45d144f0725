"""Stage-1 connector training for vision-language models, on Composer and StreamingDataset."""
