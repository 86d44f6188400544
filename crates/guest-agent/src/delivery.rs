//! How the program gets into a guest, always in the host's own version: as files of a medium that the host attaches.
//!
//! The same files lie in the share `config` (9p), which images made for Incus and LXD look for, and on the cloud-init seed,
//! which our own images and every image with cloud-init have. See `docs/adr/0014-guest-agent.md`.

/// Name of the program on the medium: the one that loaders of Incus' images start.
pub const PROGRAM: &str = "incus-agent";
/// The same for images made for LXD.
pub const PROGRAM_LXD: &str = "lxd-agent";
/// Fetches the program from the medium; `ExecStartPre` of the unit.
pub const SETUP: (&str, &str) = ("karst-agent-setup", include_str!("../delivery/karst-agent-setup"));
/// The unit.
pub const UNIT: (&str, &str) = ("karst-agent.service", include_str!("../delivery/karst-agent.service"));
/// Starts the unit when the port is there.
pub const RULES: (&str, &str) = ("99-karst-agent.rules", include_str!("../delivery/99-karst-agent.rules"));
/// Installs the three above from a mounted medium.
pub const INSTALL: (&str, &str) = ("install.sh", include_str!("../delivery/install.sh"));
/// cloud-init's vendor data where the user has none: installs the agent into images without a loader.
pub const BOOTHOOK: &str = include_str!("../delivery/boothook");
