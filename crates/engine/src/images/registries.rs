//! Registries that a project is known at by name and password. The password is sealed with its project and registry; it goes to
//! that registry and nowhere else, in nobody's answer and no log.

use super::remote::{Login, RemoteSource};
use crate::{Engine, Records, context::Context, secrets::SecretValue, tenancy::project_uses};
use karst_model::{
    Error, ProjectId, Result,
    access::Permission,
    image::ImageServerProtocol,
    registry::{LOGINS_MAX, RegistryLogin, check_password, check_user, host},
};
use karst_store::{key_part, records::login_id};

/// Longest certificate.
const CERTIFICATE: usize = 64 << 10;

/// Who a project is to be at a registry.
#[derive(Debug, Clone)]
pub struct NewLogin {
    /// `HOST` or `HOST:PORT`.
    pub host: String,
    /// Name there.
    pub user: String,
    /// Password there.
    pub password: SecretValue,
    /// Its certificate (PEM) where no authority vouches for it.
    pub certificate: Option<String>,
}

/// Whose password it is, which is sealed with it.
fn whose(project: ProjectId, host: &str) -> String {
    format!("karst registry {project} {host}")
}

/// How many registries a project is known at.
pub(crate) fn logins(records: &Records, project: ProjectId) -> usize {
    records.registry_logins.values().filter(|l| l.project == project).count()
}

pub(crate) fn path(project: &str, host: &str) -> String {
    format!("/1.0/karst/registries/{host}?project={project}")
}

/// The registry that is spoken to at an address.
fn host_of(address: &str) -> Option<String> {
    let rest = address.strip_prefix("https://")?;
    host("source.server", rest.split('/').next()?).ok()
}

impl Engine {
    /// The registries that a project is known at, by name.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn registry_logins(&self, context: &Context, project: &str) -> Result<Vec<RegistryLogin>> {
        let project = self.project(context, project, Permission::ProjectView)?;
        let records = self.inner().inventory.read();
        let of = records.registry_logins.values().filter(|l| l.project == project.id);
        let mut all: Vec<RegistryLogin> = of.map(|l| l.value.clone()).collect();
        all.sort_by(|a, b| a.host.cmp(&b.host));
        Ok(all)
    }

    /// Makes a project known at a registry, or known in another way.
    ///
    /// # Errors
    /// Invalid by field, not found, forbidden, quota; unavailable without a key for secrets.
    pub async fn registry_login_set(&self, context: &Context, project: &str, new: NewLogin) -> Result<()> {
        let project = self.project(context, project, Permission::ResourceEdit)?;
        let inner = self.inner();
        let host = host("host", &new.host)?;
        check_user("user", &new.user)?;
        check_password("password", new.password.bytes())?;
        if new.certificate.as_ref().is_some_and(|c| c.len() > CERTIFICATE) {
            return Err(Error::invalid("certificate", "the certificate is too long"));
        }
        let whose = whose(project.id, &host);
        let sealed = inner.vault.with_key(|key| key.seal_for(&*inner.env, whose.clone(), &new.password))?;
        let path = path(&project.name, &host);
        let login = RegistryLogin {
            project: project.id,
            host,
            user: new.user,
            certificate: new.certificate,
            sealed,
            spec_version: 1,
        };
        let changed = inner
            .transact(|records, tx| {
                match records.registry_logins.get(&key_part(&login_id(login.project, &login.host))) {
                    Some(old) => {
                        tx.replace(
                            old,
                            &RegistryLogin { spec_version: old.spec_version + 1, ..login.clone() },
                        );
                        Ok(true)
                    }
                    None => {
                        if logins(records, login.project) >= LOGINS_MAX {
                            let text = format!("a project is known at {LOGINS_MAX} registries at most");
                            return Err(Error::quota(text));
                        }
                        tx.expect_untouched(records, &project_uses(login.project));
                        tx.touch(&project_uses(login.project));
                        tx.create(&login);
                        Ok(false)
                    }
                }
            })
            .await?;
        let action = if changed { "registry-login-updated" } else { "registry-login-created" };
        inner.announce_of(context, Some(project.id), action, path, None);
        Ok(())
    }

    /// Forgets who a project is at a registry.
    ///
    /// # Errors
    /// Invalid by field, not found, forbidden.
    pub async fn registry_login_remove(&self, context: &Context, project: &str, name: &str) -> Result<()> {
        let project = self.project(context, project, Permission::ResourceEdit)?;
        let (inner, host) = (self.inner(), host("host", name)?);
        inner
            .transact(|records, tx| {
                let row = records.registry_logins.get(&key_part(&login_id(project.id, &host)));
                let row = row.ok_or_else(|| {
                    Error::not_found(format!("project {:?} has no name at registry {host:?}", &*project.name))
                })?;
                tx.delete(row);
                Ok(())
            })
            .await?;
        let path = path(&project.name, &host);
        inner.announce_of(context, Some(project.id), "registry-login-deleted", path, None);
        Ok(())
    }

    /// A source with what the project is known by at its registry, unless the request says so itself. Who states another
    /// certificate than the one that was kept with the password does not get that password to go there.
    ///
    /// # Errors
    /// Unavailable without the key that the password was sealed with.
    pub(super) fn with_login(&self, project: ProjectId, mut source: RemoteSource) -> Result<RemoteSource> {
        if source.from.protocol != ImageServerProtocol::Oci || source.login.is_some() {
            return Ok(source);
        }
        let Some(host) = host_of(&source.from.server) else { return Ok(source) };
        let inner = self.inner();
        let kept = inner.inventory.read().registry_logins.get(&key_part(&login_id(project, &host))).cloned();
        let Some(kept) = kept else { return Ok(source) };
        let stated = source.from.certificate.as_ref();
        if stated.is_some_and(|c| kept.certificate.as_ref() != Some(c)) {
            return Ok(source);
        }
        let password =
            inner.vault.with_key(|key| key.open_for(whose(project, &host), &kept.sealed)).map_err(|e| {
                let text = format!("the password of registry {host:?} cannot be read: {}", e.message);
                Error::new(e.kind, text)
            })?;
        source.from.certificate = kept.certificate.clone();
        source.login = Some(Login { user: kept.user.clone(), password });
        Ok(source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_names_its_registry() {
        for (address, wanted) in [
            ("https://Docker.io", Some("docker.io")),
            ("https://registry.example:8443/below", Some("registry.example:8443")),
            ("http://registry.example", None),
            ("https://", None),
        ] {
            assert_eq!(host_of(address).as_deref(), wanted, "{address}");
        }
    }
}
