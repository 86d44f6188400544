//! The TPM of a virtual machine: `tpm`.

use super::{Keys, other_keys::keys_of};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// A TPM 2.0. It has no keys of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TpmDevice {}

impl TpmDevice {
    pub(super) fn parse(keys: &Keys<'_>) -> Result<Self> {
        keys.known(&keys_of("tpm"))?;
        // Incus has them for containers, where they are demanded.
        for key in ["path", "pathrm"] {
            if keys.get(key).is_some() {
                return Err(Error::unsupported(
                    "only virtual machines have a TPM here, and theirs has no path; unset it",
                )
                .at(keys.field(key)));
            }
        }
        Ok(Self {})
    }
}
