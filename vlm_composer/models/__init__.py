"""The model: plain `nn.Module`s, tensors in and tensors out.

Nothing here knows of yaml, datasets or sharding; `vlm_composer.training` applies those from
outside.
"""
