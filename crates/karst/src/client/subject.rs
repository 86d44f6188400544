//! What a request was about, so that "not found" names it and says where to look.

use super::Client;
use crate::error::{Error, Result};

/// A kind of object, for messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A container or virtual machine.
    Instance,
    /// An image or alias.
    Image,
    /// A network.
    Network,
    /// A network ACL.
    Acl,
    /// A set of addresses.
    AddressSet,
    /// A forward of a network.
    Forward,
    /// A storage pool.
    Pool,
    /// A volume in a pool.
    Volume,
    /// A profile.
    Profile,
    /// A project.
    Project,
    /// An operation.
    Operation,
    /// A warning.
    Warning,
    /// A trusted certificate.
    Certificate,
    /// A backup of an instance.
    Backup,
    /// A backup of a volume.
    VolumeBackup,
    /// A snapshot of an instance.
    Snapshot,
    /// A snapshot of a volume.
    VolumeSnapshot,
}

impl Kind {
    /// The noun.
    pub fn noun(self) -> &'static str {
        match self {
            Self::Instance => "instance",
            Self::Image => "image",
            Self::Network => "network",
            Self::Acl => "network ACL",
            Self::AddressSet => "address set",
            Self::Forward => "forward",
            Self::Pool => "storage pool",
            Self::Volume => "volume",
            Self::Profile => "profile",
            Self::Project => "project",
            Self::Operation => "operation",
            Self::Warning => "warning",
            Self::Certificate => "certificate",
            Self::Backup | Self::VolumeBackup => "backup",
            Self::Snapshot | Self::VolumeSnapshot => "snapshot",
        }
    }

    /// The command that lists such things.
    fn list(self) -> &'static str {
        match self {
            Self::Instance => "karst list",
            Self::Image => "karst image list",
            Self::Network => "karst network list",
            Self::Acl => "karst network acl list",
            Self::AddressSet => "karst network address-set list",
            Self::Forward => "karst network forward list NETWORK",
            Self::Pool => "karst storage list",
            Self::Volume => "karst storage volume list POOL",
            Self::Profile => "karst profile list",
            Self::Project => "karst project list",
            Self::Operation => "karst operation list",
            Self::Warning => "karst warning list",
            Self::Certificate => "karst trust list",
            Self::Backup => "karst backup list INSTANCE",
            Self::VolumeBackup => "karst storage volume backup list POOL VOLUME",
            Self::Snapshot => "karst snapshot list INSTANCE",
            Self::VolumeSnapshot => "karst storage volume snapshot list POOL VOLUME",
        }
    }

    /// Whether each project has its own.
    fn in_project(self) -> bool {
        !matches!(self, Self::Pool | Self::Project | Self::Warning)
    }
}

/// Puts the subject into errors that do not name it.
pub trait About {
    /// Rewrites a bare "not found" of the server; a message that names the thing (and perhaps offers a similar
    /// name) stays as the server wrote it.
    fn about(self, client: &Client, kind: Kind, name: &str) -> Self;
}

impl<T> About for Result<T> {
    fn about(self, client: &Client, kind: Kind, name: &str) -> Self {
        self.map_err(|error| match error {
            Error::Api { status: 404, message } if is_bare(&message, kind) => {
                let place = if kind.in_project() {
                    format!(" in project \"{}\"", client.project())
                } else {
                    String::new()
                };
                let message = format!(
                    "{} \"{name}\" not found{place} ({} shows what is there)",
                    kind.noun(),
                    kind.list()
                );
                Error::Api { status: 404, message }
            }
            other => other,
        })
    }
}

/// Whether a message says of this kind of thing that it was not found and no more: neither another kind (the network
/// of a new instance, say) nor a suggestion may be lost.
fn is_bare(message: &str, kind: Kind) -> bool {
    let message = message.to_lowercase();
    let last = message.rsplit(": ").next().unwrap_or(&message);
    let noun = kind.noun().rsplit(' ').next().unwrap_or_default();
    last == "not found" || (last.ends_with("not found") && last.contains(noun))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Transport;

    fn not_found(message: &str) -> Result<()> {
        Err(Error::Api { status: 404, message: message.to_owned() })
    }

    #[test]
    fn bare_not_found_names_the_thing() {
        let client = Client::new(Transport::new("/nowhere".into()), None);
        let error = not_found("Instance not found").about(&client, Kind::Instance, "web").unwrap_err();
        assert_eq!(
            error.to_string(),
            "instance \"web\" not found in project \"default\" (karst list shows what is there)"
        );
        let wordy = "Failed to fetch instance \"web\" in project \"default\": Instance not found";
        let error = not_found(wordy).about(&client, Kind::Instance, "web").unwrap_err();
        assert!(error.to_string().starts_with("instance \"web\" not found in project"));
        let other = "Failed loading network: Network not found";
        assert_eq!(not_found(other).about(&client, Kind::Image, "debian").unwrap_err().to_string(), other);
        let error = not_found("Storage pool not found").about(&client, Kind::Pool, "fast").unwrap_err();
        assert_eq!(
            error.to_string(),
            "storage pool \"fast\" not found (karst storage list shows what is there)"
        );
    }

    #[test]
    fn the_servers_suggestion_stays() {
        let client = Client::new(Transport::new("/nowhere".into()), None);
        let text = "instance \"wbe\" not found; did you mean \"web\"?";
        assert_eq!(not_found(text).about(&client, Kind::Instance, "wbe").unwrap_err().to_string(), text);
    }
}
