//! Secrets of projects: kept for those who may have them, sealed where they are written.
//!
//! A value is sealed with AES-256 in GCM under a key that is in no record ([`SecretKey`]), together with whose it is: one that
//! was moved to another record does not open. Ephemeral secrets are in this engine's memory and nowhere else, their names
//! included; they end with it. A private one's value never leaves the engine.

use crate::{Engine, EngineInner, Records, Row, context::Context, events::Subject, tenancy::project_uses};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use karst_env::Env;
use karst_model::{
    Error, ProjectId, Result,
    access::Permission,
    secret::{SECRETS_MAX, Sealed, Secret, SecretUse, VALUE_MAX},
};
use karst_store::{key_part, records::secret_id};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::RwLock,
};
use uuid::Uuid;

/// Bytes of the key.
pub const KEY: usize = 32;

/// What values are sealed with.
pub struct SecretKey(LessSafeKey);

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey(..)")
    }
}

fn cannot(what: &str) -> Error {
    Error::internal(format!("the value of the secret cannot be {what}"), "AES-256-GCM refused it")
}

impl SecretKey {
    /// Of its bytes, which nobody can guess.
    ///
    /// # Errors
    /// Internal; the cipher takes any key of this size.
    pub fn new(bytes: &[u8; KEY]) -> Result<Self> {
        let key = UnboundKey::new(&AES_256_GCM, bytes).map_err(|_| cannot("sealed"))?;
        Ok(Self(LessSafeKey::new(key)))
    }

    /// Whose value it is, which is sealed with it.
    fn whose(secret: &Secret) -> String {
        format!("karst secret {} {}", secret.project, secret.uuid)
    }

    fn seal(&self, env: &dyn Env, secret: &Secret, value: &SecretValue) -> Result<Sealed> {
        self.seal_for(env, Self::whose(secret), value)
    }

    fn open(&self, secret: &Secret, sealed: &Sealed) -> Result<SecretValue> {
        self.open_for(Self::whose(secret), sealed)
    }

    /// Seals a value together with `whose` it is: it opens with the same words only.
    ///
    /// # Errors
    /// Internal; the cipher takes any value.
    pub(crate) fn seal_for(&self, env: &dyn Env, whose: String, value: &SecretValue) -> Result<Sealed> {
        let mut nonce = [0; NONCE_LEN];
        env.fill_random(&mut nonce);
        // With room for the tag, so that no copy of it is left behind.
        let mut bytes = Vec::with_capacity(value.0.len() + AES_256_GCM.tag_len());
        bytes.extend_from_slice(&value.0);
        let once = Nonce::assume_unique_for_key(nonce);
        self.0.seal_in_place_append_tag(once, Aad::from(whose), &mut bytes).map_err(|_| cannot("sealed"))?;
        Ok(Sealed(BASE64_STANDARD.encode([&nonce[..], &bytes].concat())))
    }

    /// Opens what was sealed with the same words.
    ///
    /// # Errors
    /// Unavailable, when it was sealed with another key or for something else.
    pub(crate) fn open_for(&self, whose: String, sealed: &Sealed) -> Result<SecretValue> {
        let other = || {
            Error::unavailable(
                "the value was sealed with a key that this server no longer has, or was tampered with; set it again",
            )
        };
        let bytes = BASE64_STANDARD.decode(&sealed.0).map_err(|_| other())?;
        let (nonce, bytes) = bytes.split_at_checked(NONCE_LEN).ok_or_else(other)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| other())?;
        let mut value = SecretValue(bytes.to_vec());
        let length = self.0.open_in_place(nonce, Aad::from(whose), &mut value.0).map_err(|_| other())?.len();
        value.0.truncate(length);
        Ok(value)
    }
}

/// A value in clear. It is not shown, and overwritten when it is dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretValue(Vec<u8>);

impl SecretValue {
    /// Of its bytes.
    ///
    /// # Errors
    /// Invalid at `value`, when there are more than [`VALUE_MAX`].
    pub fn new(bytes: Vec<u8>) -> Result<Self> {
        let value = Self(bytes);
        match value.0.len() {
            n if n > VALUE_MAX => {
                Err(Error::invalid("value", format!("has {n} bytes; at most {VALUE_MAX} are taken")))
            }
            _ => Ok(value),
        }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for SecretValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretValue(..)")
    }
}

impl Drop for SecretValue {
    fn drop(&mut self) {
        self.0.fill(0);
        // Nobody reads it any more, which a compiler takes for a reason not to write it.
        std::hint::black_box(&self.0);
    }
}

/// What a user says of a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DefineSecret {
    /// Its UUID; one is chosen for a new one that says none.
    pub uuid: Option<Uuid>,
    /// User's text.
    pub description: String,
    /// What it is for.
    pub kind: SecretUse,
    /// With what it is used.
    pub usage: String,
    /// Its value never leaves.
    pub private: bool,
    /// It is never written.
    pub ephemeral: bool,
}

/// An ephemeral secret.
struct Held {
    secret: Secret,
    value: Option<SecretValue>,
}

/// Ephemeral secrets, and the key of the others.
#[derive(Default)]
pub(crate) struct Vault {
    key: RwLock<Option<SecretKey>>,
    held: RwLock<BTreeMap<(ProjectId, Uuid), Held>>,
    /// Taken by who changes secrets: whether one is held or written is decided by one at a time.
    turn: tokio::sync::Mutex<()>,
}

impl Vault {
    /// Does what needs the key.
    ///
    /// # Errors
    /// Unavailable without one; those of the work.
    pub(crate) fn with_key<T>(&self, work: impl FnOnce(&SecretKey) -> Result<T>) -> Result<T> {
        let key = self.key.read().unwrap_or_else(|e| e.into_inner());
        let key = key.as_ref().ok_or_else(|| {
            Error::unavailable("this server has no key for secrets; its log of the start says why")
        })?;
        work(key)
    }

    fn held(&self, project: ProjectId) -> Vec<Secret> {
        let held = self.held.read().unwrap_or_else(|e| e.into_inner());
        held.values().filter(|h| h.secret.project == project).map(|h| h.secret.clone()).collect()
    }

    /// How many of a project are held.
    pub(crate) fn count(&self, project: ProjectId) -> usize {
        self.held.read().unwrap_or_else(|e| e.into_inner()).keys().filter(|(p, _)| *p == project).count()
    }

    fn change<T>(&self, work: impl FnOnce(&mut BTreeMap<(ProjectId, Uuid), Held>) -> T) -> T {
        work(&mut self.held.write().unwrap_or_else(|e| e.into_inner()))
    }
}

fn missing(uuid: Uuid) -> Error {
    Error::not_found(format!("no secret with matching uuid '{uuid}'"))
}

/// The written secret of a project.
fn row(records: &Records, project: ProjectId, uuid: Uuid) -> Option<Row<Secret>> {
    records.secrets.get(&key_part(&secret_id(project, uuid))).cloned()
}

/// How many secrets a project has that are written.
pub(crate) fn written(records: &Records, project: ProjectId) -> usize {
    records.secrets.values().filter(|s| s.project == project).count()
}

/// Claims of a secret's use: unique in its project among those of its kind.
const USES: &str = "secret-uses";

fn claim(secret: &Secret) -> Option<String> {
    (secret.kind != SecretUse::None).then(|| format!("{}:{}", secret.kind.as_str(), secret.usage))
}

/// May `new` take the place of `old`?
fn demand_same(old: &Secret, new: &Secret) -> Result<()> {
    if (old.kind, &old.usage) != (new.kind, &new.usage) {
        let text = format!("a secret with UUID {} is already defined for use with {:?}", old.uuid, old.usage);
        return Err(Error::conflict(text).at("usage"));
    }
    if old.private && !new.private {
        let text = "cannot change private flag on existing secret: what was never shown stays so";
        return Err(Error::conflict(text).at("private"));
    }
    Ok(())
}

pub(crate) fn path(project: &str, uuid: Uuid) -> String {
    format!("/1.0/karst/secrets/{uuid}?project={project}")
}

impl EngineInner {
    fn secrets_of(&self, project: ProjectId) -> Vec<Secret> {
        let records = self.inventory.read();
        let written = records.secrets.values().filter(|s| s.project == project);
        let mut all: Vec<Secret> = written.map(|s| s.value.clone()).collect();
        drop(records);
        all.extend(self.vault.held(project));
        all.sort_by_key(|s| s.uuid);
        all
    }
}

impl EngineInner {
    /// The value of a secret for what uses it: private ones too, which leave for hosts only. Nothing where the project has no such
    /// secret.
    ///
    /// # Errors
    /// Not found when it has no value; unavailable without the key that it was sealed with.
    pub(crate) fn secret_inside(&self, project: ProjectId, uuid: Uuid) -> Result<Option<SecretValue>> {
        let Some(secret) = self.secrets_of(project).into_iter().find(|s| s.uuid == uuid) else {
            return Ok(None);
        };
        let none = || {
            let text = format!(
                "secret '{uuid}' does not have a value; set it (karst secret set, or virsh secret-set-value)"
            );
            Error::not_found(text)
        };
        if secret.ephemeral {
            let value = self.vault.change(|all| all.get(&(project, uuid))?.value.clone());
            return value.ok_or_else(none).map(Some);
        }
        let sealed = secret.sealed.as_ref().ok_or_else(none)?;
        self.vault.with_key(|key| key.open(&secret, sealed)).map(Some)
    }
}

impl Engine {
    /// Gives the key that values are sealed with. Without one, values are neither taken nor given.
    pub fn set_secret_key(&self, key: SecretKey) {
        *self.inner().vault.key.write().unwrap_or_else(|e| e.into_inner()) = Some(key);
    }

    /// All secrets of a project, by UUID.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn secrets(&self, context: &Context, project: &str) -> Result<Vec<Secret>> {
        let project = self.project(context, project, Permission::ProjectView)?;
        Ok(self.inner().secrets_of(project.id))
    }

    /// A secret by its UUID.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn secret(&self, context: &Context, project: &str, uuid: Uuid) -> Result<Secret> {
        let all = self.secrets(context, project)?;
        all.into_iter().find(|s| s.uuid == uuid).ok_or_else(|| missing(uuid))
    }

    /// A secret by what it is used with.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn secret_by_use(
        &self,
        context: &Context,
        project: &str,
        kind: SecretUse,
        usage: &str,
    ) -> Result<Secret> {
        let mut all = self.secrets(context, project)?.into_iter();
        let found = all.find(|s| kind != SecretUse::None && s.kind == kind && s.usage == usage);
        found.ok_or_else(|| Error::not_found(format!("no secret with matching usage '{usage}'")))
    }

    /// Defines a secret, or what is said of one that is there; its value stays.
    ///
    /// # Errors
    /// Invalid by field, conflict (another one is used so, what is fixed), quota, not found, forbidden.
    pub async fn secret_define(&self, context: &Context, project: &str, new: DefineSecret) -> Result<Secret> {
        let project = self.project(context, project, Permission::ResourceEdit)?;
        let (inner, vault, project_id) = (self.inner(), &self.inner().vault, project.id);
        let mut secret = Secret {
            uuid: new.uuid.unwrap_or_else(|| inner.env.uuid()),
            project: project_id,
            description: new.description,
            kind: new.kind,
            usage: new.usage,
            private: new.private,
            ephemeral: new.ephemeral,
            sealed: None,
            spec_version: 1,
        };
        secret.check()?;
        let _turn = vault.turn.lock().await;
        let others = inner.secrets_of(project_id);
        let old = others.iter().find(|s| s.uuid == secret.uuid).cloned();
        match &old {
            Some(old) => {
                demand_same(old, &secret)?;
                secret.spec_version = old.spec_version + 1;
            }
            None => {
                if let Some(other) = others.iter().find(|s| claim(s).is_some() && claim(s) == claim(&secret))
                {
                    let text = format!(
                        "a secret with UUID {} already defined for use with {:?}",
                        other.uuid, other.usage
                    );
                    return Err(Error::conflict(text).at("usage"));
                }
                if others.len() >= SECRETS_MAX {
                    return Err(Error::quota(format!("a project has at most {SECRETS_MAX} secrets")));
                }
            }
        }
        let key = (project_id, secret.uuid);
        let held = vault.change(|all| all.get(&key).map(|h| h.value.clone()));
        if secret.ephemeral {
            let value = match (&held, old.as_ref().and_then(|o| o.sealed.as_ref())) {
                (Some(value), _) => value.clone(),
                (None, Some(sealed)) => Some(vault.with_key(|key| key.open(&secret, sealed))?),
                (None, None) => None,
            };
            self.unwrite(project_id, secret.uuid).await?;
            let projects: BTreeSet<ProjectId> = inner.inventory.read().projects.keys().copied().collect();
            vault.change(|all| {
                // Those of projects that are gone go too.
                all.retain(|(project, _), _| projects.contains(project));
                all.insert(key, Held { secret: secret.clone(), value });
            });
        } else {
            let sealed = match held.flatten() {
                Some(value) => Some(vault.with_key(|key| key.seal(&*inner.env, &secret, &value))?),
                None => None,
            };
            secret = inner
                .transact(|records, tx| {
                    let mut new = Secret { sealed: sealed.clone(), ..secret.clone() };
                    match row(records, project_id, new.uuid) {
                        Some(row) => {
                            // Somebody else's engine may have changed it meanwhile.
                            demand_same(&row, &new)?;
                            new.spec_version = row.spec_version + 1;
                            new.sealed = new.sealed.or_else(|| row.sealed.clone());
                            tx.replace(&row, &new);
                        }
                        None => {
                            if written(records, project_id) >= SECRETS_MAX {
                                let text = format!("a project has at most {SECRETS_MAX} secrets");
                                return Err(Error::quota(text));
                            }
                            tx.expect_untouched(records, &project_uses(project_id));
                            tx.touch(&project_uses(project_id));
                            if let Some(claim) = claim(&new) {
                                tx.take_name(USES, &project_id.to_string(), &claim, &new.uuid.to_string());
                            }
                            tx.create(&new);
                        }
                    }
                    Ok(new)
                })
                .await?;
            vault.change(|all| all.remove(&key));
        }
        let action = if old.is_some() { "secret-updated" } else { "secret-created" };
        let subject = Some(Subject::secret(&secret));
        inner.announce_of(context, Some(project_id), action, path(&project.name, secret.uuid), subject);
        Ok(secret)
    }

    /// Removes the record of a secret, if it has one.
    async fn unwrite(&self, project: ProjectId, uuid: Uuid) -> Result<()> {
        let remove = |records: &Records, tx: &mut crate::db::Tx| {
            if let Some(row) = row(records, project, uuid) {
                if let Some(claim) = claim(&row) {
                    tx.release_name(USES, &project.to_string(), &claim, &uuid.to_string());
                }
                tx.delete(&row);
            }
            Ok(())
        };
        self.inner().transact(remove).await
    }

    /// Removes a secret with its value.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub async fn secret_undefine(&self, context: &Context, project: &str, uuid: Uuid) -> Result<()> {
        let project = self.project(context, project, Permission::ResourceEdit)?;
        let inner = self.inner();
        let _turn = inner.vault.turn.lock().await;
        let found = inner.secrets_of(project.id).into_iter().find(|s| s.uuid == uuid);
        let subject = Some(Subject::secret(&found.ok_or_else(|| missing(uuid))?));
        self.unwrite(project.id, uuid).await?;
        inner.vault.change(|all| all.remove(&(project.id, uuid)));
        inner.announce_of(context, Some(project.id), "secret-deleted", path(&project.name, uuid), subject);
        Ok(())
    }

    /// Sets the value of a secret.
    ///
    /// # Errors
    /// Not found, forbidden; unavailable without a key.
    pub async fn secret_set_value(
        &self,
        context: &Context,
        project: &str,
        uuid: Uuid,
        value: SecretValue,
    ) -> Result<()> {
        let project = self.project(context, project, Permission::ResourceEdit)?;
        let (inner, vault) = (self.inner(), &self.inner().vault);
        let _turn = vault.turn.lock().await;
        let key = (project.id, uuid);
        let held = vault.change(|all| match all.get_mut(&key) {
            Some(held) => {
                held.value = Some(value.clone());
                true
            }
            None => false,
        });
        if !held {
            inner
                .transact(|records, tx| {
                    let row = row(records, project.id, uuid).ok_or_else(|| missing(uuid))?;
                    let sealed = vault.with_key(|key| key.seal(&*inner.env, &row, &value))?;
                    let new = Secret {
                        sealed: Some(sealed),
                        spec_version: row.spec_version + 1,
                        ..row.value.clone()
                    };
                    tx.replace(&row, &new);
                    Ok(())
                })
                .await?;
        }
        let of = inner.secrets_of(project.id).into_iter().find(|s| s.uuid == uuid);
        let subject = of.map(|s| Subject::secret(&s));
        inner.announce_of(
            context,
            Some(project.id),
            "secret-value-changed",
            path(&project.name, uuid),
            subject,
        );
        Ok(())
    }

    /// The value of a secret, for who may change it.
    ///
    /// # Errors
    /// Not found, also when it has none; forbidden, at `private` when it is never given to anybody; unavailable without the
    /// key that it was sealed with.
    pub fn secret_value(&self, context: &Context, project: &str, uuid: Uuid) -> Result<SecretValue> {
        let project = self.project(context, project, Permission::ResourceEdit)?;
        let (inner, vault) = (self.inner(), &self.inner().vault);
        let secret = inner.secrets_of(project.id).into_iter().find(|s| s.uuid == uuid);
        let secret = secret.ok_or_else(|| missing(uuid))?;
        if secret.private {
            return Err(Error::forbidden("secret is private").at("private"));
        }
        let none = || Error::not_found(format!("secret '{uuid}' does not have a value"));
        if secret.ephemeral {
            return vault.change(|all| all.get(&(project.id, uuid))?.value.clone()).ok_or_else(none);
        }
        let sealed = secret.sealed.as_ref().ok_or_else(none)?;
        vault.with_key(|key| key.open(&secret, sealed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(n: u128) -> Secret {
        Secret {
            uuid: Uuid::from_u128(n),
            project: ProjectId(Uuid::from_u128(1)),
            description: String::new(),
            kind: SecretUse::None,
            usage: String::new(),
            private: false,
            ephemeral: false,
            sealed: None,
            spec_version: 1,
        }
    }

    #[test]
    fn what_is_sealed_opens_with_its_key_and_in_its_place_only() {
        let env = karst_env::RealEnv::shared();
        let (key, other) = (SecretKey::new(&[1; KEY]).unwrap(), SecretKey::new(&[2; KEY]).unwrap());
        for bytes in [vec![], b"open sesame".to_vec(), vec![7; VALUE_MAX]] {
            let value = SecretValue::new(bytes).unwrap();
            let sealed = key.seal(&*env, &secret(5), &value).unwrap();
            assert_eq!(key.open(&secret(5), &sealed).unwrap(), value);
            assert_ne!(key.seal(&*env, &secret(5), &value).unwrap(), sealed, "never twice the same");
            let mut tampered = BASE64_STANDARD.decode(&sealed.0).unwrap();
            tampered[NONCE_LEN] ^= 1;
            let tampered = Sealed(BASE64_STANDARD.encode(tampered));
            for (key, of, sealed) in [
                (&other, secret(5), &sealed),
                (&key, secret(6), &sealed),
                (&key, Secret { project: ProjectId(Uuid::from_u128(2)), ..secret(5) }, &sealed),
                (&key, secret(5), &tampered),
                (&key, secret(5), &Sealed("?".into())),
                (&key, secret(5), &Sealed(String::new())),
            ] {
                let e = key.open(&of, sealed).unwrap_err();
                assert_eq!(e.kind, karst_model::ErrorKind::Unavailable, "{e}");
            }
        }
        let large = SecretValue::new(vec![0; VALUE_MAX + 1]).unwrap_err();
        assert_eq!(large.field.as_deref(), Some("value"));
    }

    #[test]
    fn values_and_keys_are_not_shown() {
        let value = SecretValue::new(b"open sesame".to_vec()).unwrap();
        let shown = format!("{value:?} {:?}", SecretKey::new(&[1; KEY]).unwrap());
        assert_eq!(shown, "SecretValue(..) SecretKey(..)");
    }
}
