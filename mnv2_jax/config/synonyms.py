"""Names of options in other libraries, and our names for them.

They are no aliases: an error refuses such a name and suggests ours.
"""

from __future__ import annotations

_BY_KEY = {
    "optim.peak_lr": "lr learning_rate lr0 initial_lr base_lr max_lr peak_learning_rate",
    "optim.final_lr": "lrf min_lr final_learning_rate eta_min",
    "optim.name": "optimizer optimiser opt optim",
    "optim.schedule": "scheduler sched lr_scheduler lr_schedule lr_scheduler_type cos_lr",
    "optim.warmup_epochs": "warmup warmup_ep num_warmup_epochs",
    "optim.warmup_steps": "num_warmup_steps warmup_iters",
    "optim.momentum": "mom",
    "optim.weight_decay": "wd decay",
    "optim.clip_grad_norm": "clip_grad grad_clip max_grad_norm gradient_clip_val clip clip_norm",
    "optim.accumulate_steps": "accumulate grad_accum gradient_accumulation_steps accumulate_grad_batches nbs",
    "optim.ema_decay": "ema model_ema model_ema_decay",
    "train.epochs": "epochs epoch num_epochs max_epochs num_train_epochs",
    "train.steps": "steps max_steps num_steps iterations iters max_iter",
    "train.patience": "patience early_stopping early_stop",
    "train.eval_every_epochs": "eval_every eval_interval val_interval check_val_every_n_epoch",
    "data.batch_size": "batch_size batch bs per_device_train_batch_size train_batch_size",
    "data.eval_batch_size": "eval_batch per_device_eval_batch_size val_batch_size validation_batch_size",
    "data.resolution": "imgsz res resolution image_size img_size input_size size crop_size",
    "data.eval_resolution": "eval_res val_resize_size test_input_size eval_size",
    "data.num_workers": "workers num_workers dataloader_num_workers j",
    "data.path": "data_dir data_path dataset_path train_dir root",
    "data.name": "dataset dataset_name",
    "data.holdout_fraction": "val_split validation_split val_pct test_size",
    "data.flip": "hflip fliplr horizontal_flip",
    "data.crop_area": "scale random_resized_crop",
    "data.crop_ratio": "ratio",
    "augment.mixup_alpha": "mixup mixup_a",
    "augment.cutmix_alpha": "cutmix",
    "augment.erase_probability": "reprob random_erase random_erasing erasing",
    "augment.policy": "aa auto_augment autoaugment randaugment rand_augment trivial_augment",
    "augment.color_jitter": "jitter colour_jitter",
    "augment.rotation_degrees": "degrees rotation rotate",
    "augment.repeats": "ra_reps aug_repeats",
    "loss.label_smoothing": "smoothing smooth",
    "loss.class_weights": "class_weight weights_per_class",
    "model.name": "model arch architecture backbone network",
    "model.width": "width_mult alpha width_multiplier",
    "model.dtype": "amp fp16 bf16 half mixed_precision precision dtype compute_dtype",
    "model.num_classes": "num_classes nc classes num_labels n_classes",
    "model.dropout": "drop drop_rate dropout_rate",
    "model.drop_path": "drop_path_rate stochastic_depth",
    "init.weights": "weights pretrained checkpoint ckpt initial_checkpoint finetune_from",
    "finetune.train_from": "freeze freeze_layers freeze_backbone frozen trainable_layers",
    "finetune.backbone_lr_factor": "layer_decay backbone_lr lr_mult",
    "norm.decay": "bn_momentum bn_decay norm_momentum",
    "norm.epsilon": "bn_eps bn_epsilon",
    "norm.group_size": "ghost_batch virtual_batch_size sync_bn",
    "distill.teacher": "teacher",
    "distill.temperature": "temperature",
    "log.every_steps": "log_interval logging_steps log_every print_freq",
    "checkpoint.every_steps": "save_period save_steps checkpoint_interval save_every",
    "checkpoint.keep_latest": "save_total_limit max_to_keep checkpoint_hist",
    "seed": "random_seed",
}
_BY_FLAG = {
    "--workdir": "output output_dir save_dir project name resume out exp_dir logdir log_dir run_dir",
    "--mode=eval": "eval evaluate val validate test",
    "--config=NAME:data=folder:DIR": "data",
    "--config": "cfg conf config_file recipe",
    "--json": "format",
    "JAX_PLATFORMS=cpu, cuda or tpu in the environment": "device gpu gpus cuda accelerator devices",
}
KEYS = {word: key for key, words in _BY_KEY.items() for word in words.split()}
"""Our config keys by other libraries' names."""
FLAGS = {word: flag for flag, words in _BY_FLAG.items() for word in words.split()}
"""Our flags, and settings that have no flag, by other libraries' names."""


def synonym_of(word: str) -> str | None:
    """Returns our name, as typed on a command line, for a name from another library; None for an unknown one.

    Args:
      word: a flag such as ``--learning-rate``, or the last part of a key.
    """
    plain = word.lstrip("-").replace("-", "_").lower()
    if plain in KEYS:
        return f"--config.{KEYS[plain]}"
    return FLAGS.get(plain)
