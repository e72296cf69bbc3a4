"""The demo as a configuration of MMEngine's own, for MMEngine's own runner or tools/train.py.

python datasets/prepare_demo.py
python tools/train.py -opt options/mmengine/demo_ucdir.py --trust-config
python -c "from mmengine.config import Config; from mmengine.runner import Runner
Runner.from_cfg(Config.fromfile('options/mmengine/demo_ucdir.py')).train()"
"""

custom_imports = dict(imports=["ucdir_plugin"])
default_scope = "ucdir_plugin"  # of names without a scope; what is not there is MMEngine's
work_dir = "experiments/mm_demo_ucdir"

iterations = 800
network = dict(
    type="UCDIR",
    predictor=dict(type="SIDUNet", width=16, levels=3, residual=True),
    denoiser=dict(
        type="UCDIRDenoiser", inner_channel=16, channel_mults=[1, 2, 4, 4], res_blocks=1, attn_res=[], dropout=0.0
    ),
)
model = dict(
    type="UCDIRModel",
    opt=dict(  # the keys of option files
        network_g=network,
        diffusion=dict(type="linear", timesteps=2000, start=1e-6, end=1e-2),
        train=dict(
            diffusion_opt=dict(type="NoisePredictionLoss"),
            initial_opt=dict(type="L1Loss", loss_weight=0.5),
            optim_g=dict(type="AdamW", lr=2e-3, weight_decay=0.01),
            ema_decay=0.995,
        ),
        val=dict(sampling=dict(sampler="ddpm", steps=20)),
    ),
)

photographs = dict(
    type="JPEGDataset", dataroot_gt="datasets/demo/train", quality=10, gt_size=64, use_hflip=True, use_rot=True
)
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    dataset=dict(type="BasicSRDataset", opt=photographs),
    sampler=dict(type="InfiniteSampler", shuffle=True),  # or KeyedSampler, batch=4: then a resumed run is the same
)
val_dataloader = dict(
    batch_size=1,
    dataset=dict(
        type="BasicSRDataset", phase="val", opt=dict(type="JPEGDataset", dataroot_gt="datasets/demo/test", quality=10)
    ),
    sampler=dict(type="DefaultSampler", shuffle=False),
)
test_dataloader = val_dataloader

train_cfg = dict(type="IterBasedTrainLoop", max_iters=iterations, val_interval=iterations)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

optim_wrapper = dict(constructor="DiffusionOptimConstructor")  # optimizer and clipping as model.opt.train says
param_scheduler = dict(type="CosineAnnealingLR", T_max=iterations, eta_min=1e-5, by_epoch=False)

measured = dict(
    psnr=dict(type="calculate_psnr", crop_border=0),
    ssim=dict(type="calculate_ssim", crop_border=0),
)
val_evaluator = dict(type="RestorationMetrics", metrics=measured)  # or a list: [dict(type="calculate_loe"), ...]
test_evaluator = val_evaluator

default_hooks = dict(
    logger=dict(type="LoggerHook", interval=100, log_metric_by_epoch=False),
    checkpoint=dict(type="CheckpointHook", interval=200, by_epoch=False),
)
custom_hooks = [
    dict(type="PlainCheckpointHook"),  # checkpoints that load without running code
    dict(type="AverageHook", decay=0.995, start=0),
    dict(type="NoiseBandsHook", interval=100),
    dict(type="PicturesHook"),
]
visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")])
log_processor = dict(by_epoch=False)
