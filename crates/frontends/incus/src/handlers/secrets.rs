//! `/1.0/karst/secrets`: secrets of a project, such as passphrases of encrypted volumes. Values come in and are in no answer.

use crate::{
    app::Call,
    respond::{Reply, empty, sync},
};
use karst_engine::secrets::{DefineSecret, SecretValue};
use karst_model::{
    Error, Result,
    secret::{Secret, SecretUse},
};
use serde_json::{Value, json};
use uuid::Uuid;

fn view(secret: &Secret) -> Value {
    json!({
        "uuid": secret.uuid.to_string(),
        "description": secret.description,
        "type": secret.kind.as_str(),
        "usage": secret.usage,
        "private": secret.private,
        "ephemeral": secret.ephemeral,
    })
}

fn named(text: &str) -> Result<Uuid> {
    Uuid::parse_str(text).map_err(|_| Error::not_found(format!("no secret with matching uuid {text:?}")))
}

/// `GET /1.0/karst/secrets`: `[{"uuid", "description", "type", "usage", "private", "ephemeral"}]`
///
/// # Errors
/// Not found, forbidden.
pub async fn list(call: Call) -> Result<Reply> {
    let all = call.engine().secrets(&call.context, call.project())?;
    sync(&all.iter().map(view).collect::<Vec<Value>>())
}

/// `POST /1.0/karst/secrets`: `{"uuid", "description", "type", "usage", "private", "ephemeral", "value"}`: a new secret, of which it
/// answers what is no secret; without a UUID it gets one.
///
/// # Errors
/// Those of the engine; conflict when there is one of that UUID.
pub async fn create(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let uuid = f.text("uuid")?.filter(|u| !u.is_empty()).map(|u| {
        Uuid::parse_str(&u).map_err(|_| Error::invalid("uuid", format!("uuid: {u:?} is not a UUID")))
    });
    let uuid = uuid.transpose()?;
    let kind = match f.text("type")?.filter(|k| !k.is_empty()) {
        None => SecretUse::None,
        Some(word) => SecretUse::ALL.iter().copied().find(|k| k.as_str() == word).ok_or_else(|| {
            let known: Vec<_> = SecretUse::ALL.iter().map(|k| k.as_str()).collect();
            Error::invalid("type", format!("type: {word:?} is not there; {} are", known.join(", ")))
        })?,
    };
    let new = DefineSecret {
        uuid,
        description: f.text("description")?.unwrap_or_default(),
        kind,
        usage: f.text("usage")?.unwrap_or_default(),
        private: f.flag("private")?,
        ephemeral: f.flag("ephemeral")?,
    };
    let value = f.text("value")?.map(|v| SecretValue::new(v.into_bytes())).transpose()?;
    f.finish(&[])?;
    let (engine, project) = (call.engine(), call.project());
    if value.is_some() {
        // Nothing is made whose value could not be kept.
        engine.display_passwords_kept(&call.context, project)?;
    }
    if let Some(uuid) = uuid
        && engine.secrets(&call.context, project)?.iter().any(|s| s.uuid == uuid)
    {
        return Err(Error::conflict(format!("a secret with UUID {uuid} is there already")).at("uuid"));
    }
    let made = engine.secret_define(&call.context, project, new).await?;
    if let Some(value) = value {
        engine.secret_set_value(&call.context, project, made.uuid, value).await?;
    }
    sync(&view(&made))
}

/// `PUT /1.0/karst/secrets/{uuid}`: `{"value"}`
///
/// # Errors
/// Those of the engine.
pub async fn change(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let value = SecretValue::new(f.need_text("value")?.into_bytes())?;
    f.finish(&[])?;
    call.engine().secret_set_value(&call.context, call.project(), named(call.param(0))?, value).await?;
    Ok(empty())
}

/// `DELETE /1.0/karst/secrets/{uuid}`: also of one that is used; what it opens does not start any more.
///
/// # Errors
/// Those of the engine.
pub async fn delete(call: Call) -> Result<Reply> {
    call.engine().secret_undefine(&call.context, call.project(), named(call.param(0))?).await?;
    Ok(empty())
}
