//! What is kept of an image's metadata with an instance, and its templates.

use crate::{
    app::{Call, Taken},
    fields::Fields,
    request,
    respond::{Etag, Reply, empty, full, sync, sync_etag},
};
use hyper::{
    Method, Response,
    header::{CONTENT_DISPOSITION, CONTENT_TYPE, HeaderValue},
};
use karst_model::{
    Config, Error, Result,
    template::{InstanceMetadata, MAX_BYTES, Scalar, TemplateRule, WrittenRule, write_rules},
};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;

const VIEW: &str = "metadata";

#[derive(Serialize)]
struct View<'a> {
    architecture: &'a str,
    creation_date: i64,
    expiry_date: i64,
    properties: &'a Config,
    templates: BTreeMap<&'a str, WrittenRule>,
}

/// `GET /1.0/instances/{name}/metadata`
///
/// # Errors
/// Those of the engine.
pub async fn get(call: Call) -> Result<Reply> {
    let (view, metadata) = call.engine().instance_metadata(&call.context, call.project(), call.param(0))?;
    let shown = View {
        architecture: &metadata.architecture,
        creation_date: metadata.creation_date,
        expiry_date: metadata.expiry_date,
        properties: &metadata.properties,
        templates: write_rules(&metadata.templates.rules),
    };
    sync_etag(&shown, &Etag::of(VIEW, view.instance.id.uuid(), metadata.version))
}

fn rule(value: Value, path: &str) -> Result<TemplateRule> {
    let at = format!("templates.{path}");
    let mut f = Fields::of(value, &at)?;
    let text = |f: &mut Fields, name| -> Result<Option<Scalar>> { Ok(f.text(name)?.map(Scalar::Text)) };
    let written = WrittenRule {
        when: f.texts("when")?,
        create_only: f.flag("create_only")?,
        template: f.text("template")?.unwrap_or_default(),
        properties: f
            .config("properties")?
            .map(|all| all.into_iter().map(|(k, v)| (k, Scalar::Text(v))).collect()),
        uid: text(&mut f, "uid")?,
        gid: text(&mut f, "gid")?,
        mode: text(&mut f, "mode")?,
    };
    f.finish(&[])?;
    written.read(&at)
}

/// Takes what a body says over `into`.
fn read(f: &mut Fields, into: &mut InstanceMetadata) -> Result<()> {
    if let Some(architecture) = f.text("architecture")? {
        into.architecture = architecture;
    }
    if let Some(date) = f.integer("creation_date")? {
        into.creation_date = date;
    }
    if let Some(date) = f.integer("expiry_date")? {
        into.expiry_date = date;
    }
    into.properties.extend(f.config("properties")?.unwrap_or_default());
    match f.take("templates") {
        None => {}
        Some(Value::Object(all)) => {
            for (path, value) in all {
                let rule = rule(value, &path)?;
                into.templates.rules.insert(path, rule);
            }
        }
        Some(_) => return Err(Error::invalid("templates", "templates must be an object")),
    }
    Ok(())
}

/// `PUT` and `PATCH /1.0/instances/{name}/metadata`
///
/// # Errors
/// Those of the engine; invalid by field.
pub async fn change(call: Call) -> Result<Reply> {
    let (view, now) = call.engine().instance_metadata(&call.context, call.project(), call.param(0))?;
    let expected = call.expected(VIEW, view.instance.id.uuid(), now.version)?;
    let patch = call.request.method() == Method::PATCH;
    // Without a condition a replacement replaces whatever is there; a patch goes over what was read.
    let expected = if patch { Some(now.version) } else { expected };
    let (call, mut f): (Taken, Fields) = call.fields().await?;
    let mut new = if patch { now } else { InstanceMetadata::default() };
    read(&mut f, &mut new)?;
    f.finish(&[])?;
    call.engine()
        .instance_metadata_update(&call.context, call.project(), call.param(0), new, expected)
        .await?;
    Ok(empty())
}

fn template(query: &crate::request::Query) -> Result<String> {
    query
        .get("path")
        .map(str::to_owned)
        .ok_or_else(|| Error::invalid("path", "the name of the template is missing (?path=NAME)"))
}

/// `GET /1.0/instances/{name}/metadata/templates`, and one of them with `?path=NAME`
///
/// # Errors
/// Those of the engine.
pub async fn templates(call: Call) -> Result<Reply> {
    let Some(name) = call.query.get("path") else {
        let (_, metadata) = call.engine().instance_metadata(&call.context, call.project(), call.param(0))?;
        return sync(&metadata.templates.files.keys().collect::<Vec<_>>());
    };
    let text = call.engine().instance_template(&call.context, call.project(), call.param(0), name)?;
    let mut reply = Response::new(full(text));
    let headers = reply.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    let plain: String = name.chars().filter(|c| c.is_ascii_graphic() && *c != '"').collect();
    if let Ok(v) = HeaderValue::from_str(&format!("inline;filename={plain}")) {
        headers.insert(CONTENT_DISPOSITION, v);
    }
    Ok(reply)
}

/// `POST /1.0/instances/{name}/metadata/templates?path=NAME`
///
/// # Errors
/// Those of the engine; a body that is too large or no text.
pub async fn write(call: Call) -> Result<Reply> {
    let name = template(&call.query)?;
    // Who may not, or whose instance is not there, hears of that first.
    call.engine().instance_metadata(&call.context, call.project(), call.param(0))?;
    let Call { app, context, params, query, request, .. } = call;
    let body = request::bytes(request.into_body(), MAX_BYTES).await?;
    let text = std::str::from_utf8(&body).map_err(|_| Error::invalid("body", "the template is not UTF-8"))?;
    let instance = params.first().map_or("", String::as_str);
    app.engine.instance_template_write(&context, query.project(), instance, &name, text).await?;
    Ok(empty())
}

/// `DELETE /1.0/instances/{name}/metadata/templates?path=NAME`
///
/// # Errors
/// Those of the engine.
pub async fn delete(call: Call) -> Result<Reply> {
    let name = template(&call.query)?;
    call.engine().instance_template_delete(&call.context, call.project(), call.param(0), &name).await?;
    Ok(empty())
}
