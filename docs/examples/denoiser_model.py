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
        """Take true images."""
        self.gt = self.lq = data["gt"].to(self.device)

    def add_noise(self, sigma, generator=None):
        """Set the images to be denoised, ``lq``, and their noise levels, ``sigma`` (B,) of [0, 1]."""
        self.sigma = sigma.to(self.device)
        noise = torch.randn(self.gt.shape, generator=generator).to(self.device)
        self.lq = self.gt + self.sigma.view(-1, 1, 1, 1) * noise

    def optimize_parameters(self, current_iter):
        """One step of Adam on the L1 distance."""
        self.add_noise(torch.rand(len(self.gt)) * 50 / 255)
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
        self.add_noise(torch.full((len(self.gt),), 25 / 255), torch.Generator().manual_seed(0))
        net = self.net_g_ema if hasattr(self, "net_g_ema") else self.net_g
        net.eval()
        with torch.no_grad():
            self.output = net(self.lq, self.sigma)
        self.net_g.train(self.is_train)
