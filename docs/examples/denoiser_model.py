"""A model of one's own: a denoiser that is told the noise level, such as DRUNet, as a prior for BIR-D.

python tools/train.py -opt docs/examples/drunet.yml --import denoiser_model      (with docs/examples in PYTHONPATH)
"""

import torch
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import MODEL_REGISTRY


@MODEL_REGISTRY.register()
class DenoiserModel(SRModel):
    """Trains on true images with Gaussian noise of 0 to 50 of 255, one level an image; validates at 25."""

    def feed_data(self, data):
        """Take true images; noise is drawn anew each time."""
        self.gt = data["gt"].to(self.device)
        training = self.net_g.training and self.is_train
        count = len(self.gt)
        self.sigma = torch.rand(count, device=self.device) * 50 / 255 if training else torch.full((count,), 25 / 255)
        noise = torch.randn(self.gt.shape, generator=None if training else torch.Generator().manual_seed(0))
        self.lq = self.gt + self.sigma.view(-1, 1, 1, 1) * noise

    def optimize_parameters(self, current_iter):
        """One step of Adam on the L1 distance."""
        self.optimizer_g.zero_grad()
        self.output = self.net_g(self.lq, self.sigma)
        loss = self.cri_pix(self.output, self.gt)
        loss.backward()
        self.optimizer_g.step()
        self.log_dict = self.reduce_loss_dict({"l_pix": loss})
        if self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay)

    def test(self):
        """Denoise with the averaged network."""
        net = self.net_g_ema if hasattr(self, "net_g_ema") else self.net_g
        net.eval()
        with torch.no_grad():
            self.output = net(self.lq, self.sigma)
        self.net_g.train(self.is_train)
