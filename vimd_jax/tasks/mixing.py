"""Mixup and cutmix: every image of a batch is mixed with another one, and so are their labels.

Mixup (Zhang et al., https://arxiv.org/abs/1710.09412) adds the two images, cutmix (Yun et al.,
https://arxiv.org/abs/1905.04899) pastes a box of one into the other. As in timm's batch mode, a group of images has
one kind, one weight and one box, and an image's partner is the one at the mirrored position of the group. In the
originals a group is the share of one GPU; here it is the whole batch or a given number of images, whatever the number
of devices.
"""

from functools import partial

import jax
import jax.numpy as jnp

from vimd_jax.losses import smoothed_targets


def mix(
    key: jax.Array,
    views: dict[str, jax.Array],
    labels: jax.Array,
    num_classes: int,
    *,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
    probability: float = 1.0,
    switch_probability: float = 0.5,
    group_size: int = 0,
    smoothing: float = 0.0,
    axis_name: str | None = None,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Mixes the images of a batch in pairs.

    Args:
      key: the same on every device.
      views: the images at one or more resolutions, each (batch, height, width, channels) of any dtype. All are mixed
        alike: cutmix' box consists of whole pixels of the view with the fewest.
      labels: (batch,) integers.
      num_classes: length of a soft label.
      mixup_alpha: the weight of mixup is drawn from Beta(alpha, alpha); 0 is no mixup.
      cutmix_alpha: the same of cutmix, where the weight is the share of the image outside of the box before the box is
        cut off at the image's border.
      probability: that a group is mixed at all.
      switch_probability: that it is by cutmix, where both are on.
      group_size: images that share one draw; 0, or as many as the batch has or more: the whole batch. See
        `check_groups`.
      smoothing: of the labels.
      axis_name: the axis of the devices that share the batch, each holding the next slice. Groups are those of the
        whole batch, so that the number of devices changes nothing.

    Returns:
      The mixed views, float32 in the range of the given ones, and soft labels (batch, num_classes), which weigh the two
      images by the share of the pixels that comes from each.
    """
    height, width = min((view.shape[1:3] for view in views.values()), key=lambda size: size[0] * size[1])
    groups = _Groups(len(labels), group_size, axis_name)
    draw = partial(
        _weights, height=height, width=width, mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha,
        probability=probability, switch_probability=switch_probability,
    )  # fmt: skip
    weights = groups.each_image(jax.vmap(draw)(groups.keys(key)))

    def mixed(view: jax.Array) -> jax.Array:
        rows, columns = _cells(view.shape[1], height), _cells(view.shape[2], width)
        weight = weights[:, rows[:, None], columns, None]
        return weight * view.astype(jnp.float32) + (1 - weight) * groups.partners(view).astype(jnp.float32)

    own, other = (smoothed_targets(x, num_classes, smoothing) for x in (labels, groups.partners(labels)))
    share = weights.mean(axis=(1, 2))[:, None]
    return {name: mixed(view) for name, view in views.items()}, share * own + (1 - share) * other


def check_groups(batch_size: int, group_size: int, devices: int) -> None:
    """Raises ValueError unless groups of this size divide a batch, and devices the groups or groups the devices."""
    share = batch_size // devices
    if 0 < group_size < batch_size and (batch_size % group_size or (share % group_size and group_size % share)):
        raise ValueError(
            f"config.mixing.group_size is {group_size}: it must divide config.batch_size, {batch_size}, and divide the "
            f"{share} images of a device or be a multiple of them; 0 is the whole batch."
        )


class _Groups:
    """The groups of a batch that devices share, as one device sees them."""

    def __init__(self, share: int, group_size: int, axis_name: str | None):
        self._axis = axis_name
        self._devices = jax.lax.axis_size(axis_name) if axis_name else 1
        self._share, total = share, share * self._devices
        self._size = min(group_size or total, total)
        self._is_whole_batch = self._size == total

    def keys(self, key: jax.Array) -> jax.Array:
        """A key for each group that this device has images of, (groups,)."""
        if self._is_whole_batch:
            return key[None]
        first = jax.lax.axis_index(self._axis) * self._share if self._axis else 0
        numbers = first // self._size + jnp.arange(max(1, self._share // self._size))
        return jax.vmap(partial(jax.random.fold_in, key))(numbers)

    def each_image(self, x: jax.Array) -> jax.Array:
        """Spreads a draw for each group (groups, …) to the images of this device (images, …)."""
        return jnp.repeat(x, self._share // len(x), axis=0)

    def partners(self, x: jax.Array) -> jax.Array:
        """The images at the mirrored places of their groups."""
        if self._size <= self._share:
            groups = x.reshape(-1, self._size, *x.shape[1:])
            return groups[:, ::-1].reshape(x.shape)
        span = self._size // self._share  # devices of a group
        mirrored = [(i, i // span * span + span - 1 - i % span) for i in range(self._devices)]
        return jax.lax.ppermute(x, self._axis, mirrored)[::-1]


def _weights(
    key: jax.Array,
    height: int,
    width: int,
    mixup_alpha: float,
    cutmix_alpha: float,
    probability: float,
    switch_probability: float,
) -> jax.Array:
    """The weight of the own image at each pixel (height, width): of cutmix 0 in a box and 1 elsewhere."""
    apply, switch, share, box = jax.random.split(key, 4)
    if not (mixup_alpha and cutmix_alpha):
        switch_probability = float(cutmix_alpha > 0)
    by_cutmix = jax.random.bernoulli(switch, switch_probability)
    alpha = jnp.where(by_cutmix, cutmix_alpha, mixup_alpha)
    share = jax.random.beta(share, alpha, alpha)
    weights = jnp.where(by_cutmix, ~_box(box, height, width, share), share)
    return jnp.where(jax.random.bernoulli(apply, probability), weights, 1.0)


def _box(key: jax.Array, height: int, width: int, outside: jax.Array) -> jax.Array:
    """Mask (height, width) of a random box of the image's aspect ratio and 1 - outside times its area.

    Its centre is uniform over the pixels, and what reaches over the border is cut off (Yun et al., eq. 2).
    """

    def inside(key: jax.Array, size: int) -> jax.Array:
        half = jnp.floor(size * jnp.sqrt(1 - outside)).astype(jnp.int32) // 2
        position = jnp.arange(size) - jax.random.randint(key, (), 0, size)
        return (-half <= position) & (position < half)

    rows, columns = jax.random.split(key)
    return inside(rows, height)[:, None] & inside(columns, width)


def _cells(size: int, cells: int) -> jax.Array:
    """In which of `cells` equal parts each of `size` pixels has its centre."""
    return (2 * jnp.arange(size) + 1) * cells // (2 * size)
