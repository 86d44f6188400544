//! Principals, roles and permissions.

use crate::{PrincipalId, ProjectId};
use serde::{Deserialize, Serialize};

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Principal {
    /// Stable id; for unix peers derived from the uid.
    pub id: PrincipalId,
    /// How it was authenticated.
    pub identity: Identity,
    /// Roles it has.
    pub grants: Vec<Grant>,
}

/// How a principal was authenticated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Identity {
    /// Peer of a unix socket, by kernel credentials.
    UnixPeer {
        /// User id.
        uid: u32,
        /// Group id.
        gid: u32,
        /// Process id when it connected.
        pid: i32,
    },
    /// Whoever shows a trusted certificate.
    Certificate {
        /// SHA-256 of it, hex.
        fingerprint: String,
        /// Its name here.
        name: String,
        /// Address and port of the client.
        address: String,
    },
    /// Whoever shows an API token.
    Token {
        /// Its name.
        name: String,
        /// Address and port of the client.
        address: String,
    },
    /// The platform itself (reconcilers, bootstrap).
    System,
    /// Nobody: unauthenticated.
    Anonymous,
}

impl Identity {
    /// In words, for operations and the audit log.
    pub fn describe(&self) -> String {
        match self {
            Self::UnixPeer { uid, .. } => format!("unix user {uid}"),
            Self::Certificate { fingerprint, name, .. } => format!("certificate {fingerprint} {name:?}"),
            Self::Token { name, .. } => format!("token {name}"),
            Self::System => "karst".into(),
            Self::Anonymous => "anonymous".into(),
        }
    }
}

/// A role over a scope.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// Role.
    pub role: Role,
    /// Where; `None` is everywhere.
    pub project: Option<ProjectId>,
}

/// Roles; each a set of permissions ([`Role::allows`] is the one table).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Everything.
    Admin,
    /// Everything within projects.
    Operator,
    /// Uses instances: power, exec, console, files.
    User,
    /// Sees.
    Viewer,
    /// Reads metrics.
    Metrics,
}

impl Role {
    /// All of them.
    pub const ALL: &[Role] = &[Role::Admin, Role::Operator, Role::User, Role::Viewer, Role::Metrics];

    /// Its word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Admin => "admin",
            Self::Operator => "operator",
            Self::User => "user",
            Self::Viewer => "viewer",
            Self::Metrics => "metrics",
        }
    }

    /// Of its word.
    ///
    /// # Errors
    /// Invalid at `role`, naming what there is.
    pub fn parse(text: &str) -> crate::Result<Self> {
        Self::ALL.iter().copied().find(|r| r.as_str() == text).ok_or_else(|| {
            let all: Vec<_> = Self::ALL.iter().map(|r| r.as_str()).collect();
            crate::Error::invalid("role", format!("{text:?} is not a role; there are {}", all.join(", ")))
        })
    }
}

/// What one may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Permission {
    /// See what the server is in general: version, pools, what it can do.
    ServerView,
    /// See all of the server's state: hosts, warnings, configuration, who is trusted.
    ServerInspect,
    /// Change the server, its nodes, pools.
    ServerEdit,
    /// See a project and all in it.
    ProjectView,
    /// Create, change and delete projects.
    ProjectEdit,
    /// Create, change and delete instances, profiles, networks, images, volumes of a project.
    ResourceEdit,
    /// Start, stop, exec, console, files.
    InstanceUse,
    /// Read figures: of the server, or of a project's instances.
    MetricsView,
}

impl Permission {
    /// All of them.
    pub const ALL: &[Permission] = &[
        Permission::ServerView,
        Permission::ServerInspect,
        Permission::ServerEdit,
        Permission::ProjectView,
        Permission::ProjectEdit,
        Permission::ResourceEdit,
        Permission::InstanceUse,
        Permission::MetricsView,
    ];

    /// Its word, as in `karst access why`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ServerView => "server_view",
            Self::ServerInspect => "server_inspect",
            Self::ServerEdit => "server_edit",
            Self::ProjectView => "project_view",
            Self::ProjectEdit => "project_edit",
            Self::ResourceEdit => "resource_edit",
            Self::InstanceUse => "instance_use",
            Self::MetricsView => "metrics_view",
        }
    }

    /// Of its word.
    ///
    /// # Errors
    /// Invalid at `permission`, naming what there is.
    pub fn parse(text: &str) -> crate::Result<Self> {
        Self::ALL.iter().copied().find(|p| p.as_str() == text).ok_or_else(|| {
            let all: Vec<_> = Self::ALL.iter().map(|p| p.as_str()).collect();
            let message = format!("{text:?} is not a permission; there are {}", all.join(", "));
            crate::Error::invalid("permission", message)
        })
    }

    /// Is it about a project's content rather than the server?
    pub fn is_project_scoped(self) -> bool {
        matches!(self, Self::ProjectView | Self::ResourceEdit | Self::InstanceUse | Self::MetricsView)
    }
}

impl Role {
    /// The table: does the role include the permission?
    pub fn allows(self, p: Permission) -> bool {
        use Permission as P;
        match self {
            Role::Admin => true,
            Role::Operator => !matches!(p, P::ServerEdit | P::ProjectEdit),
            Role::User => !matches!(p, P::ServerEdit | P::ProjectEdit | P::ResourceEdit),
            Role::Viewer => matches!(p, P::ServerView | P::ServerInspect | P::ProjectView | P::MetricsView),
            Role::Metrics => matches!(p, P::ServerView | P::MetricsView),
        }
    }
}

impl Principal {
    /// May it do `p` in `project` (`None`: on the server)? A grant over one project never reaches the server's own things,
    /// but everybody who is known sees what the server is.
    pub fn may(&self, p: Permission, project: Option<ProjectId>) -> bool {
        if p == Permission::ServerView && project.is_none() {
            return self.is_known();
        }
        self.grants.iter().any(|g| {
            g.role.allows(p)
                && match (g.project, project) {
                    (None, _) => true,
                    (Some(have), Some(want)) => have == want,
                    (Some(_), None) => false,
                }
        })
    }

    /// Is it somebody?
    pub fn is_known(&self) -> bool {
        self.identity != Identity::Anonymous
    }

    /// Somebody who shows a certificate or token with these roles.
    pub fn of(id: PrincipalId, identity: Identity, grants: Vec<Grant>) -> Self {
        Self { id, identity, grants }
    }

    /// The platform itself.
    pub fn system() -> Self {
        Self {
            id: PrincipalId(uuid::Uuid::from_u128(1)),
            identity: Identity::System,
            grants: vec![Grant { role: Role::Admin, project: None }],
        }
    }

    /// A peer of the administrative unix socket: full administrator.
    pub fn unix_admin(uid: u32, gid: u32, pid: i32) -> Self {
        Self {
            id: PrincipalId(uuid::Uuid::from_u128(0x6b61_7273_7400_0000_0000_0000_0000_0000 | uid as u128)),
            identity: Identity::UnixPeer { uid, gid, pid },
            grants: vec![Grant { role: Role::Admin, project: None }],
        }
    }

    /// Nobody.
    pub fn anonymous() -> Self {
        Self { id: PrincipalId(uuid::Uuid::nil()), identity: Identity::Anonymous, grants: vec![] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grant_over_a_project_stays_in_it() {
        let a = ProjectId(uuid::Uuid::from_u128(10));
        let b = ProjectId(uuid::Uuid::from_u128(11));
        let p = Principal {
            grants: vec![Grant { role: Role::Operator, project: Some(a) }],
            ..Principal::unix_admin(1, 1, 1)
        };
        assert!(p.may(Permission::ServerView, None) && !p.may(Permission::ServerInspect, None));
        assert!(p.may(Permission::ResourceEdit, Some(a)));
        assert!(!p.may(Permission::ResourceEdit, Some(b)));
        assert!(!p.may(Permission::ServerEdit, None) && !p.may(Permission::ProjectEdit, None));
        assert!(Permission::ALL.iter().all(|x| !Principal::anonymous().may(*x, Some(a))));
    }
}
