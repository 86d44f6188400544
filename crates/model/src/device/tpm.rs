//! The TPM of a virtual machine: `tpm`.

use super::{Keys, other_keys::keys_of};
use crate::{Error, Result, encryption};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A TPM 2.0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TpmDevice {
    /// The secret whose value its state is encrypted with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<Uuid>,
}

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
        let secret = keys.get(encryption::SECRET);
        let secret = secret.map(|text| encryption::parse_secret(&keys.field(encryption::SECRET), text));
        Ok(Self { secret: secret.transpose()? })
    }
}
