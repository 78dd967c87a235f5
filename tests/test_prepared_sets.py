"""Every dataset from its archives to a trained network: prepared, then one epoch of a tiny network."""

import official_archives as official
import pytest
from tiny import tiny_config

from vimd_jax import report, train
from vimd_jax.data.prepare import prepare
from vimd_jax.training.metrics import read_metrics

# What docs/segmentation.md says of each. The number of classes is that of the miniature's label maps where it may be.
LABEL_MAPS = {
    "ade20k": {"num_classes": 10, "label_values": "1..10", "ignored_values": "0"},
    "camvid": {"num_classes": 10, "ignored_values": "10,11"},
    "voc": {"num_classes": 10, "ignored_values": "10"},
}


@pytest.mark.parametrize("name", official.MINIATURES)
def test_a_prepared_set_trains(name, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "save_pictures", lambda *_: None)  # they have their own tests
    monkeypatch.setattr(report, "save", lambda *_: None)
    layout, archives = official.miniature(name, tmp_path / "downloads")
    prepare(layout, archives, tmp_path / "data")
    maps = LABEL_MAPS.get(name)
    config = tiny_config("segmenter" if maps else "classifier", schedule__num_epochs=1, selection="test")
    config.dataset.update({"name": "label_maps" if maps else "folder", "directory": str(tmp_path / "data")})
    config.dataset.update({"validation_fraction": 0.0} | (maps or {}))
    config.batch_size = config.eval_batch_size = 2
    if maps:
        config.segmenter.head = "linear"
        config.segmenter.auxiliary_channels = 0
    config.schedule.warmup_epochs = 0
    train.train(config, tmp_path / "run")
    scores = [line for line in read_metrics(tmp_path / "run") if "best_step" in line["metrics"]]
    test = "test" if "test" in layout.sizes else "val"
    assert scores[0]["metrics"]["count"] == layout.sizes[test]
    assert (tmp_path / "run" / "best" / "network.json").exists()
