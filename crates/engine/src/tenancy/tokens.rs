//! API tokens: secrets that are shown with each request, for programs that cannot keep a certificate.
//!
//! A token reads `karst_ID_SECRET`: its id (32 hex digits, no secret) and 64 hex digits of secret.

use super::trust::{check_name, hash, project_ids, random_secret, same};
use crate::{Engine, Row, context::Context};
use jiff::Timestamp;
use karst_model::{
    Error, PrincipalId, Result,
    access::{Grant, Identity, Permission, Principal, Role},
    trust::ApiToken,
};

const PREFIX: &str = "karst_";

/// What a user says of a new token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewApiToken {
    /// Unique name.
    pub name: String,
    /// User's text.
    pub description: String,
    /// What it may.
    pub role: Role,
    /// Where: names of projects, or everywhere when there is none.
    pub projects: Vec<String>,
    /// Worthless from then on.
    pub expires_at: Option<Timestamp>,
}

impl Engine {
    /// Who shows this token.
    ///
    /// # Errors
    /// Unauthenticated for one that is malformed, unknown, wrong or expired, without saying which.
    pub fn principal_by_token(&self, token: &str, address: &str) -> Result<Principal> {
        let refused = || Error::unauthenticated("the token is not valid");
        let (id, secret) = token.strip_prefix(PREFIX).and_then(|t| t.split_once('_')).ok_or_else(refused)?;
        let id = PrincipalId(uuid::Uuid::parse_str(id).map_err(|_| refused())?);
        let now = self.inner().env.now();
        let records = self.inner().inventory.read();
        let row = records.tenancy.api_tokens.get(&id).ok_or_else(refused)?;
        if !same(&row.secret_hash, &hash(secret)) || row.expires_at.is_some_and(|at| at <= now) {
            return Err(refused());
        }
        let identity = Identity::Token { name: row.name.clone(), address: address.to_owned() };
        Ok(Principal::of(row.id, identity, row.grants.clone()))
    }

    /// API tokens, by name; their secrets are known to nobody.
    ///
    /// # Errors
    /// Forbidden.
    pub fn api_tokens(&self, context: &Context) -> Result<Vec<Row<ApiToken>>> {
        context.demand_server(Permission::ServerInspect)?;
        let mut all: Vec<_> = self.inner().inventory.read().tenancy.api_tokens.values().cloned().collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// Makes a token and answers it: the only time that it is known.
    ///
    /// # Errors
    /// Invalid by field, conflict (taken name), not found (project), forbidden.
    pub async fn api_token_create(&self, context: &Context, new: NewApiToken) -> Result<String> {
        context.demand_server(Permission::ServerEdit)?;
        check_name(&new.name)?;
        if new.name.contains('/') {
            return Err(Error::invalid("name", "the name of a token has no slash"));
        }
        let inner = self.inner();
        let now = inner.env.now();
        if new.expires_at.is_some_and(|at| at <= now) {
            return Err(Error::invalid("expires_at", "the token would have expired already"));
        }
        let secret = random_secret(self);
        let id = PrincipalId(inner.env.uuid());
        let token = format!("{PREFIX}{}_{secret}", id.uuid().simple());
        let mut salt = [0; 16];
        inner.env.fill_random(&mut salt);
        let scram = super::scram::verifier(&token, &salt);
        inner
            .transact(|records, tx| {
                if records.tenancy.api_token(&new.name).is_ok() {
                    let text = format!("a token {:?} exists already", new.name);
                    return Err(Error::conflict(text).at("name"));
                }
                let projects = project_ids(records, tx, &new.projects)?;
                let grants = match projects.is_empty() {
                    true => vec![Grant { role: new.role, project: None }],
                    false => {
                        projects.into_iter().map(|p| Grant { role: new.role, project: Some(p) }).collect()
                    }
                };
                tx.take_name("api-tokens", "", &new.name, &id.to_string());
                tx.create(&ApiToken {
                    id,
                    name: new.name.clone(),
                    description: new.description.clone(),
                    secret_hash: hash(&secret),
                    scram: Some(scram.clone()),
                    grants,
                    created_at: now,
                    expires_at: new.expires_at,
                    spec_version: 1,
                });
                Ok(())
            })
            .await?;
        inner.announce(context, None, "token-created", format!("/1.0/karst/tokens/{}", new.name));
        Ok(token)
    }

    /// Deletes a token: its next request is nobody's.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub async fn api_token_delete(&self, context: &Context, name: &str) -> Result<()> {
        context.demand_server(Permission::ServerEdit)?;
        self.inner()
            .transact(|records, tx| {
                let row = records.tenancy.api_token(name)?;
                tx.delete(row);
                tx.release_name("api-tokens", "", &row.name, &row.id.to_string());
                Ok(())
            })
            .await?;
        self.inner().announce(context, None, "token-deleted", format!("/1.0/karst/tokens/{name}"));
        Ok(())
    }
}
