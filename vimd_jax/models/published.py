"""Published results and weights of each network, and the image preprocessing that the weights expect."""

from typing import Any, NamedTuple


class Family(NamedTuple):
    """Sources of a family of networks.

    Attributes:
      paper: short name and address of the paper.
      source: where the results, costs and files below are published.
      licence: licence of the weights and where it is stated; None if none was found.
    """

    paper: str
    source: str
    licence: str | None


class Published(NamedTuple):
    """Published figures and weights of one network.

    Attributes:
      family: a key of `FAMILIES`.
      parameters: number of trainable parameters of the original.
      top1: accuracy on ImageNet-1k in %.
      operations: billions of operations, as the authors count them.
      file: the weights, `hf://owner/repository/file` or the address of a file; None if there are none.
      mebibytes: size of that file, where known.
      crop: share of the short side in the evaluation crop; for classifiers the central 224 of 256 pixels. All were
        evaluated on images resized bicubically, as this library resizes.
      input_normalization: whether it was trained on images normalised by ImageNet's mean and standard deviation.
      mean_iou: mean IoU of a segmenter on ADE20K's validation images, at a single scale, in %.
    """

    family: str
    parameters: int
    top1: float | None = None
    operations: float | None = None
    file: str | None = None
    mebibytes: float | None = None
    crop: float = 0.875
    input_normalization: bool = True
    mean_iou: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Options of the network under which it sees images as published."""
        return {"input_normalization": True} if self.input_normalization else {}


FAMILIES = {
    "Vim": Family(
        "[Vim](https://arxiv.org/abs/2401.09417)",
        "results: README of hustvl/Vim; operations: README of hunto/LocalMamba",
        None,
    ),
    "V2M": Family(
        "[V2M](https://arxiv.org/abs/2410.10382)",
        "README of wangck20/V2M (result.png); no usual way of counting yields its operations. No weights are published",
        None,
    ),
    "LocalMamba": Family(
        "[LocalMamba](https://arxiv.org/abs/2403.09338)",
        "README of hunto/LocalMamba; of two networks, LocalVim-S and LocalVMamba-T, it links no weights",
        "Apache 2.0 (LICENSE of hunto/LocalMamba)",
    ),
    "EfficientVMamba": Family(
        "[EfficientVMamba](https://arxiv.org/abs/2403.09977)",
        "README of TerryPei/EfficientVMamba",
        "Apache 2.0 (README of TerryPei/EfficientVMamba)",
    ),
    "VMamba": Family(
        "[VMamba](https://arxiv.org/abs/2401.10166)",
        "README of MzeroMiko/VMamba, first release (v0)",
        "MIT (LICENSE of MzeroMiko/VMamba)",
    ),
    "VMamba 2": Family(
        "[VMamba](https://arxiv.org/abs/2401.10166)",
        "README of MzeroMiko/VMamba, second release (v2)",
        "MIT (LICENSE of MzeroMiko/VMamba)",
    ),
    "VMamba UperNet": Family(
        "[VMamba](https://arxiv.org/abs/2401.10166)",
        "assets/performance.md of MzeroMiko/VMamba, releases v0seg and v2seg",
        "MIT (LICENSE of MzeroMiko/VMamba)",
    ),
    "SRResNet": Family(
        "[SRGAN](https://arxiv.org/abs/1609.04802)",
        "scripts/download_weights.sh of Lornatang/SRGAN-PyTorch; whether its x4 file has the same weights as "
        "SRResNet_x4-ImageNet-6dd5216c.pth.tar, which ViMD's authors used, is not known",
        "Apache 2.0 (headers of the code of Lornatang/SRGAN-PyTorch)",
    ),
}

_LOCAL_MAMBA = "https://github.com/hunto/LocalMamba/releases/download/v1.0.0"
_VMAMBA = "https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls"
_VMAMBA_2 = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls"
_VMAMBA_UPERNET = "https://github.com/MzeroMiko/VMamba/releases/download/%23v{}seg/{}_iter_{}.pth"
_SRGAN = "hf://goodfellowliu/SRGAN-PyTorch"

PUBLISHED = {
    "vim_tiny": Published(
        "Vim", 7_148_008, 76.1, 1.5, "hf://hustvl/Vim-tiny-midclstok/vim_t_midclstok_76p1acc.pth", 109.7
    ),
    "vim_tiny_stride8": Published(
        "Vim", 7_250_344, 78.3, None, "hf://hustvl/Vim-tiny-midclstok/vim_t_midclstok_ft_78p3acc.pth", 111.2
    ),
    "vim_small": Published(
        "Vim", 25_796_584, 80.5, 5.1, "hf://hustvl/Vim-small-midclstok/vim_s_midclstok_80p5acc.pth", 394.2
    ),
    "vim_small_stride8": Published(
        "Vim", 26_001_256, 81.6, None, "hf://hustvl/Vim-small-midclstok/vim_s_midclstok_ft_81p6acc.pth", 397.4
    ),
    "vim_base": Published(
        "Vim", 97_598_440, 81.9, None, "hf://hustvl/Vim-base-midclstok/vim_b_midclstok_81p9acc.pth", 1489.8
    ),
    "v2m_tiny": Published("V2M", 6_852_712, 76.2, 1.9),
    "v2m_small": Published("V2M", 25_205_992, 80.5, 5.9),
    "local_vim_tiny": Published("LocalMamba", 7_994_152, 76.2, 1.5, f"{_LOCAL_MAMBA}/local_vim_tiny.ckpt"),
    "local_vim_tiny_middle_token": Published(
        "LocalMamba", 7_994_536, 77.8, 1.5, f"{_LOCAL_MAMBA}/local_vim_tiny_middle_cls_token.ckpt"
    ),
    "local_vim_small": Published("LocalMamba", 27_783_784, 81.1, 4.8),
    "local_vmamba_tiny": Published("LocalMamba", 25_527_160, 82.7, 5.7),
    "local_vmamba_small": Published("LocalMamba", 49_748_536, 83.7, 11.4, f"{_LOCAL_MAMBA}/local_vssm_small.ckpt"),
    "efficient_vmamba_tiny": Published(
        "EfficientVMamba", 6_493_660, 76.5, 0.8, "hf://TerryPei/EfficientVMamba-Tiny/efficient_vmamba_tiny.ckpt"
    ),
    "efficient_vmamba_small": Published(
        "EfficientVMamba", 11_273_688, 78.7, 1.3, "hf://TerryPei/EfficientVMamba-Small/efficient_vmamba_small.ckpt"
    ),
    "efficient_vmamba_base": Published(
        "EfficientVMamba", 33_717_136, 81.8, 4.0, "hf://TerryPei/EfficientVMamba-Base/efficient_vmamba_base.ckpt"
    ),
    "vmamba_tiny": Published("VMamba", 22_893_448, 82.2, 5.6, f"{_VMAMBA}/vssmtiny_dp01_ckpt_epoch_292.pth"),
    "vmamba_small": Published("VMamba", 44_417_416, 83.5, 11.2, f"{_VMAMBA}/vssmsmall_dp03_ckpt_epoch_238.pth"),
    "vmamba_base": Published("VMamba", 76_254_056, 83.7, 18.0, f"{_VMAMBA}/vssmbase_dp06_ckpt_epoch_241.pth"),
    "vmamba2_tiny": Published("VMamba 2", 30_705_832, 82.5, 4.9, f"{_VMAMBA_2}/vssm_tiny_0230_ckpt_epoch_262.pth"),
    "vmamba2_tiny_s1l8": Published(
        "VMamba 2", 30_249_064, 82.6, 4.9, f"{_VMAMBA_2}/vssm1_tiny_0230s_ckpt_epoch_264.pth"
    ),
    "vmamba2_small": Published("VMamba 2", 50_147_752, 83.6, 8.7, f"{_VMAMBA_2}/vssm_small_0229_ckpt_epoch_222.pth"),
    "vmamba2_small_s1l20": Published(
        "VMamba 2", 49_012_840, 83.3, 8.6, f"{_VMAMBA_2}/vssm1_small_0229s_ckpt_epoch_240.pth"
    ),
    "vmamba2_base": Published("VMamba 2", 88_557_800, 83.9, 15.4, f"{_VMAMBA_2}/vssm_base_0229_ckpt_epoch_237.pth"),
    "vmamba2_base_s1l20": Published(
        "VMamba 2", 86_614_504, 83.8, 15.2, f"{_VMAMBA_2}/vssm1_base_0229s_ckpt_epoch_225.pth"
    ),
    **{
        f"upernet_{backbone}": Published(
            "VMamba UperNet",
            parameters,
            file=_VMAMBA_UPERNET.format(release, name, iterations),
            crop=1.0,
            mean_iou=mean_iou,
        )
        for backbone, parameters, release, name, iterations, mean_iou in (
            ("vmamba_tiny", 54_546_956, 0, "vssmtiny_upernet_4xb4-160k_ade20k-512x512", 160000, 47.3),
            ("vmamba_small", 76_070_924, 0, "vssmsmall_upernet_4xb4-160k_ade20k-512x512", 160000, 49.5),
            ("vmamba_base", 109_765_548, 0, "vssmbase_upernet_4xb4-160k_ade20k-512x512", 128000, 50.0),
            ("vmamba2_tiny", 62_359_340, 2, "upernet_vssm_4xb4-160k_ade20k-512x512_tiny", 160000, 48.3),
            ("vmamba2_tiny_s1l8", 61_902_572, 2, "upernet_vssm_4xb4-160k_ade20k-512x512_tiny_s", 160000, 47.9),
            ("vmamba2_small", 81_801_260, 2, "upernet_vssm_4xb4-160k_ade20k-512x512_small", 144000, 50.6),
            ("vmamba2_base", 122_069_292, 2, "upernet_vssm_4xb4-160k_ade20k-512x512_base", 160000, 51.0),
        )
    },
    **{
        f"srresnet_x{scale}": Published(
            "SRResNet",
            parameters,
            file=f"{_SRGAN}/SRResNet_x{scale}-SRGAN_ImageNet.pth.tar",
            crop=1.0,
            input_normalization=False,
        )
        for scale, parameters in ((2, 1_399_637), (4, 1_547_350), (8, 1_695_063))
    },
}


def page(file: str) -> str:
    """The web page that offers a file: its repository on the Hugging Face Hub, or its release on GitHub."""
    folder = file.rpartition("/")[0]
    return folder.replace("hf://", "https://huggingface.co/").replace("/releases/download/", "/releases/tag/")
