"""Load images as scripts with torchvision do, for the comparison of LeNet with PyTorch: `--torch`."""

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms


class Images(Dataset):
    """Load images as torchvision's MNIST does: each one becomes a PIL image and passes through transforms."""

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.25,))])

    def __init__(self, images, labels):
        self.images, self.labels = images[:, 0], labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = Image.fromarray(self.images[index].numpy())
        return self.transform(image), int(self.labels[index])


def make_loader(images: torch.Tensor, labels: torch.Tensor, batch_size: int) -> DataLoader:
    """Return a loader of shuffled full batches of images, uint8 of shape (examples, 1, height, width)."""
    return DataLoader(Images(images, labels), batch_size, shuffle=True, drop_last=True)
