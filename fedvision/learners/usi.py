"""USI: any network trained by one recipe, with the predictions of a strong teacher beside the labels.

Source: Solving ImageNet: a Unified Scheme for Training any Backbone to Top Results, arXiv 2204.03475.
"""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Float[Tensor, "n classes"], targets: Float[Tensor, "n classes"]) -> Float[Tensor, ""]:
    """CE = 1/n sum_i sum_c -y_ic log softmax(z_i)_c, with soft targets y."""
    return -(targets * logits.log_softmax(1)).sum(1).mean()


def distillation(
    student: Float[Tensor, "n classes"], teacher: Float[Tensor, "n classes"], temperature: float = 1.0, rescaled: bool = False
) -> Float[Tensor, ""]:
    """KD = 1/n sum_i KL(softmax(t_i / tau) || softmax(s_i / tau)): how far the student's prediction is from the teacher's.

    Args:
        student: logits s.
        teacher: logits t.
        temperature: tau > 0; more than 1 softens both.
        rescaled: times tau^2, which keeps the gradient's size whatever tau is.

    Source: arXiv 2204.03475, section 3.2; tau^2: Hinton et al., arXiv 1503.02531, section 2.
    """
    own, goal = (student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
    divergence = F.kl_div(own, goal, reduction="batchmean", log_target=True)
    return divergence * temperature**2 if rescaled else divergence


def objective(
    labels: Float[Tensor, ""] | float, teacher: Float[Tensor, ""] | float, alpha: float, only_teacher: bool = False
) -> Float[Tensor, ""] | float:
    """L = CE + alpha KD, or alpha KD alone.

    Args:
        labels: CE.
        teacher: KD.
        alpha: weight of the teacher, 0 or more.
        only_teacher: whether the labels are left out.
    """
    return alpha * teacher if only_teacher else labels + alpha * teacher
