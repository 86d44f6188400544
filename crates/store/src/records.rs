//! The tables of the model's records.

use crate::Record;
use karst_model::{
    backup::Backup,
    checkpoint::Checkpoint,
    display::DisplayLock,
    firewall::{AddressSet, NetworkAcl, NetworkForward},
    image::{Image, ImageAlias},
    instance::{Instance, Runtime},
    network::Network,
    node::Node,
    operation::Operation,
    profile::Profile,
    project::Project,
    registry::RegistryLogin,
    secret::Secret,
    snapshot::{Snapshot, VolumeSnapshot},
    storage::{Pool, Volume},
    trust::{ApiToken, Certificate, ServerConfig, TrustToken},
    warning::Warning,
};

macro_rules! records {
    ($($t:ty: $table:literal $(version $version:literal)? = |$r:ident| $id:expr;)+) => {$(
        impl Record for $t {
            const TABLE: &'static str = $table;
            $(const VERSION: u32 = $version;)?
            fn record_id(&self) -> String { let $r = self; $id }
        }
    )+};
}

records! {
    Node: "nodes" = |r| r.id.to_string();
    Project: "projects" version 2 = |r| r.id.to_string();
    Profile: "profiles" = |r| r.id.to_string();
    Pool: "pools" = |r| r.id.to_string();
    Volume: "volumes" = |r| r.id.to_string();
    Network: "networks" = |r| r.id.to_string();
    NetworkAcl: "network_acls" = |r| r.id.to_string();
    AddressSet: "address_sets" = |r| r.id.to_string();
    NetworkForward: "network_forwards" = |r| forward_id(r.network, r.listen_address);
    Image: "images" = |r| r.id.to_string();
    ImageAlias: "aliases" = |r| alias_id(r.project, &r.name);
    Backup: "backups" = |r| r.id.to_string();
    Instance: "instances" = |r| r.id.to_string();
    Runtime: "runtimes" = |r| r.instance.to_string();
    Snapshot: "snapshots" = |r| r.id.to_string();
    Checkpoint: "checkpoints" = |r| r.id.to_string();
    VolumeSnapshot: "volume_snapshots" = |r| r.id.to_string();
    Operation: "operations" = |r| r.id.to_string();
    Certificate: "certificates" = |r| r.id.to_string();
    TrustToken: "trust-tokens" = |r| r.id.to_string();
    ApiToken: "api-tokens" = |r| r.id.to_string();
    DisplayLock: "display-locks" = |r| r.instance.to_string();
    RegistryLogin: "registry-logins" = |r| login_id(r.project, &r.host);
    Secret: "secrets" = |r| secret_id(r.project, r.uuid);
    Warning: "warnings" = |r| r.id.to_string();
    ServerConfig: "server" = |_r| "config".into();
}

/// Identity of a forward in its table: its network and listen address.
pub fn forward_id(network: karst_model::NetworkId, listen: std::net::IpAddr) -> String {
    format!("{network}:{listen}")
}

/// Identity of a secret in its table: its UUID is its user's choice, and another project's may be the same.
pub fn secret_id(project: karst_model::ProjectId, uuid: uuid::Uuid) -> String {
    format!("{project}:{uuid}")
}

/// Identity of who a project is at a registry.
pub fn login_id(project: karst_model::ProjectId, host: &str) -> String {
    format!("{project}:{host}")
}

/// Identity of an image alias in its table: it is found by project and name.
pub fn alias_id(project: karst_model::ProjectId, name: &str) -> String {
    format!("{project}:{name}")
}
