//! Roles that principals have, and why somebody may or may not do something.

use crate::{Engine, Records, Row, context::Context};
use karst_model::{
    Error, PrincipalId, ProjectId, Result,
    access::{Grant, Permission, Role},
    trust::{ApiToken, Certificate, CertificateKind},
};
use serde::Serialize;

/// Somebody who was given roles.
#[derive(Debug, Clone)]
enum Subject {
    Certificate(Row<Certificate>),
    Token(Row<ApiToken>),
    /// Whoever can connect to the unix socket.
    Socket,
}

/// Who has a role somewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AccessEntry {
    /// Fingerprint of a certificate, or name of a token.
    pub identifier: String,
    /// `tls` or `token`.
    pub provider: &'static str,
    /// Role.
    pub role: &'static str,
    /// Name of the project; none is everywhere.
    pub project: Option<String>,
}

/// The answer to "may A do B with C, and why".
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Why {
    /// Who.
    pub principal: String,
    /// What.
    pub permission: &'static str,
    /// With what: `server`, or `project NAME`.
    pub object: String,
    /// Does the table of roles allow it?
    pub allowed: bool,
    /// Each thing that decided or did not, in words.
    pub because: Vec<String>,
}

impl Subject {
    /// By `certificate/FINGERPRINT`, `token/NAME`, `unix`, or without the prefix: a beginning of a fingerprint, the name
    /// of one certificate, the name of a token.
    fn find(records: &Records, reference: &str) -> Result<Self> {
        let all = &records.tenancy;
        if let Some(fingerprint) = reference.strip_prefix("certificate/") {
            return all.certificate(fingerprint).cloned().map(Self::Certificate);
        }
        if let Some(name) = reference.strip_prefix("token/") {
            return all.api_token(name).cloned().map(Self::Token);
        }
        if reference == "unix" {
            return Ok(Self::Socket);
        }
        if let Ok(found) = all.certificate(reference) {
            return Ok(Self::Certificate(found.clone()));
        }
        let mut named = all.certificates.values().filter(|c| c.name == reference);
        match (named.next(), named.next(), all.api_token(reference)) {
            (Some(one), None, Err(_)) => Ok(Self::Certificate(one.clone())),
            (None, _, Ok(token)) => Ok(Self::Token(token.clone())),
            (None, _, Err(_)) => Err(Error::not_found(format!(
                "nobody known is {reference:?}; give a certificate's fingerprint or name, a token's name, or unix"
            ))
            .at("principal")),
            _ => Err(Error::invalid(
                "principal",
                format!("{reference:?} are several; say certificate/FINGERPRINT or token/NAME"),
            )),
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::Certificate(c) => format!("certificate {} {:?}", &c.fingerprint[..12], c.name),
            Self::Token(t) => format!("token {:?}", t.name),
            Self::Socket => "the unix socket".into(),
        }
    }

    /// Roles, each with where it is from.
    fn grants(&self) -> Vec<(Grant, &'static str)> {
        match self {
            Self::Socket => vec![(
                Grant { role: Role::Admin, project: None },
                "whoever can connect to it is administrator",
            )],
            Self::Token(t) => t.grants.iter().cloned().map(|g| (g, "given to the token")).collect(),
            Self::Certificate(c) => {
                let given = |g: &Grant| c.kind == CertificateKind::Client && c.grants.contains(g);
                let from = |g: &Grant| match (given(g), c.restricted, c.kind) {
                    (true, ..) => "given to the certificate",
                    (_, _, CertificateKind::Metrics) => "the certificate is for metrics",
                    (_, true, _) => "the certificate is restricted to it",
                    _ => "the certificate is not restricted",
                };
                c.roles().into_iter().map(|g| (g.clone(), from(&g))).collect()
            }
        }
    }
}

/// What a permission is asked about.
enum Object {
    Server,
    Project(ProjectId, String),
}

impl Object {
    /// `server`, `project/NAME`, or a path of the API with its `project`.
    fn find(records: &Records, text: &str) -> Result<Self> {
        let project = |name: &str| {
            records.project(name).map(|p| Self::Project(p.id, p.name.to_string())).map_err(|e| e.at("object"))
        };
        if text == "server" {
            return Ok(Self::Server);
        }
        if let Some(name) = text.strip_prefix("project/").or(text.strip_prefix("/1.0/projects/")) {
            return project(name.split('?').next().unwrap_or(name));
        }
        let Some(path) = text.strip_prefix("/1.0") else {
            let text = "an object is server, project/NAME, or a path such as /1.0/instances/c1?project=p";
            return Err(Error::invalid("object", text));
        };
        let (path, query) = path.split_once('?').unwrap_or((path, ""));
        let of_projects = ["instances", "images", "profiles", "networks", "network-acls", "storage-volumes"];
        let first = path.trim_start_matches('/').split('/').next().unwrap_or_default();
        let volumes = first == "storage-pools" && path.contains("/volumes");
        let kept = path.starts_with("/karst/secrets/") || path.starts_with("/karst/registries/");
        if !of_projects.contains(&first) && !volumes && !kept {
            return Ok(Self::Server);
        }
        project(query.split('&').find_map(|p| p.strip_prefix("project=")).unwrap_or("default"))
    }
}

impl Engine {
    /// Who has a role: everywhere, or in the project of this name only when one is given.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn access(&self, context: &Context, project: Option<&str>) -> Result<Vec<AccessEntry>> {
        context.demand_server(Permission::ServerInspect)?;
        let records = self.inner().inventory.read();
        let wanted = project.map(|p| records.project(p).map(|p| p.id)).transpose()?;
        let certificates = records.tenancy.certificates.values().cloned().map(Subject::Certificate);
        let tokens = records.tenancy.api_tokens.values().cloned().map(Subject::Token);
        let mut all = vec![];
        for subject in certificates.chain(tokens) {
            let (identifier, provider) = match &subject {
                Subject::Certificate(c) => (c.fingerprint.clone(), "tls"),
                Subject::Token(t) => (t.name.clone(), "token"),
                Subject::Socket => continue,
            };
            for (grant, _) in subject.grants() {
                if wanted.is_some() && grant.project.is_some() && grant.project != wanted {
                    continue;
                }
                let project = grant.project.and_then(|p| records.projects.get(&p));
                if grant.project.is_some() && project.is_none() {
                    continue;
                }
                all.push(AccessEntry {
                    identifier: identifier.clone(),
                    provider,
                    role: grant.role.as_str(),
                    project: project.map(|p| p.name.to_string()),
                });
            }
        }
        all.sort_by(|a, b| (&a.identifier, &a.project, a.role).cmp(&(&b.identifier, &b.project, b.role)));
        Ok(all)
    }

    /// Gives a role to a certificate or token, in a project or everywhere; given already, nothing changes.
    ///
    /// # Errors
    /// Not found, invalid (the unix socket, a certificate for metrics), forbidden.
    pub async fn access_grant(
        &self,
        context: &Context,
        principal: &str,
        role: Role,
        project: Option<&str>,
    ) -> Result<()> {
        self.access_change(context, principal, role, project, true).await
    }

    /// Takes a role that was given away again. What a certificate has by itself (as restricted to projects, or not) is
    /// changed with the certificate.
    ///
    /// # Errors
    /// Not found, also when it was not given; forbidden.
    pub async fn access_revoke(
        &self,
        context: &Context,
        principal: &str,
        role: Role,
        project: Option<&str>,
    ) -> Result<()> {
        self.access_change(context, principal, role, project, false).await
    }

    async fn access_change(
        &self,
        context: &Context,
        principal: &str,
        role: Role,
        project: Option<&str>,
        give: bool,
    ) -> Result<()> {
        context.demand_server(Permission::ServerEdit)?;
        let change = |grants: &mut Vec<Grant>, grant: &Grant| -> Result<()> {
            let before = grants.len();
            grants.retain(|g| g != grant);
            match (give, grants.len() < before) {
                (true, _) => grants.push(grant.clone()),
                (false, true) => {}
                (false, false) => return Err(Error::not_found("this role was not given").at("role")),
            }
            Ok(())
        };
        let source = self
            .inner()
            .transact(|records, tx| {
                let project = match project {
                    Some(name) => {
                        let row = records.project(name).map_err(|e| e.at("project"))?;
                        tx.expect(row);
                        Some(row.id)
                    }
                    None => None,
                };
                let grant = Grant { role, project };
                match Subject::find(records, principal)? {
                    Subject::Socket => {
                        Err(Error::invalid("principal", "the unix socket is the administrator's, always"))
                    }
                    Subject::Certificate(row) if row.kind == CertificateKind::Metrics => Err(Error::invalid(
                        "principal",
                        "a certificate for metrics reads metrics and nothing else",
                    )),
                    Subject::Certificate(row) => {
                        let mut new = row.value.clone();
                        change(&mut new.grants, &grant)?;
                        new.spec_version += 1;
                        tx.replace(&row, &new);
                        Ok(format!("/1.0/certificates/{}", row.fingerprint))
                    }
                    Subject::Token(row) => {
                        let mut new = row.value.clone();
                        change(&mut new.grants, &grant)?;
                        new.spec_version += 1;
                        tx.replace(&row, &new);
                        Ok(format!("/1.0/karst/tokens/{}", row.name))
                    }
                }
            })
            .await?;
        self.inner().announce(context, None, if give { "access-granted" } else { "access-revoked" }, source);
        Ok(())
    }

    /// May `principal` do `permission` with `object`, and why? Everybody may ask about himself (`me`).
    ///
    /// # Errors
    /// Invalid or not found by field; forbidden.
    pub fn access_why(
        &self,
        context: &Context,
        principal: &str,
        permission: Permission,
        object: &str,
    ) -> Result<Why> {
        context.demand_known()?;
        let asker: PrincipalId = context.principal().id;
        if principal != "me" {
            context.demand_server(Permission::ServerInspect)?;
        }
        let records = self.inner().inventory.read();
        let tenancy = &records.tenancy;
        let subject = match principal {
            "me" => tenancy
                .certificates
                .get(&asker)
                .cloned()
                .map(Subject::Certificate)
                .or_else(|| tenancy.api_tokens.get(&asker).cloned().map(Subject::Token))
                .unwrap_or(Subject::Socket),
            other => Subject::find(&records, other)?,
        };
        let found = Object::find(&records, object)?;
        if let Object::Project(id, name) = &found
            && !context.principal().may(Permission::ProjectView, Some(*id))
            && !context.principal().may(Permission::ServerInspect, None)
        {
            return Err(Error::not_found(format!("project {name:?} not found")).at("object"));
        }
        Ok(explain(&records, &subject, permission, &found))
    }
}

fn explain(records: &Records, subject: &Subject, permission: Permission, object: &Object) -> Why {
    let p = permission.as_str();
    let (name, target) = match object {
        Object::Server => ("server".to_owned(), None),
        Object::Project(id, name) => (format!("project {name}"), Some(*id)),
    };
    let mut because = vec![];
    let mut allowed = false;
    if permission == Permission::ServerView && target.is_none() {
        allowed = true;
        because.push(format!("{p}: whoever is known sees what the server is"));
    }
    for (grant, from) in subject.grants() {
        let place = match grant.project {
            None => "everywhere".to_owned(),
            Some(id) => match records.projects.get(&id) {
                Some(project) => format!("in project {}", project.name),
                None => continue,
            },
        };
        let reaches = match (grant.project, target) {
            (None, _) => true,
            (Some(have), Some(want)) => have == want,
            (Some(_), None) => false,
        };
        let includes = grant.role.allows(permission);
        let verdict = match (reaches, includes) {
            (true, true) => format!("includes {p}"),
            (true, false) => format!("does not include {p}"),
            (false, _) => format!("does not reach {name}"),
        };
        because.push(format!("role {} {place} ({from}): {verdict}", grant.role.as_str()));
        allowed |= reaches && includes;
    }
    if because.is_empty() {
        because.push("no role was given".into());
    }
    Why { principal: subject.describe(), permission: p, object: name, allowed, because }
}
