//! `/1.0/profiles`.

use super::list as respond_list;
use crate::{
    app::Call,
    filter::Filter,
    respond::{Etag, Reply, created, empty, sync_etag},
    wire::{self, misc::ProfileView},
};
use karst_engine::tenancy::UpdateProfile;
use karst_model::Result;

const VIEW: &str = "profile";
/// What a view has beside what can be changed; and the envelope of the answer, which Ansible's module sends back with it.
const READ_ONLY: &[&str] = &[
    "name",
    "used_by",
    "project",
    "type",
    "status",
    "status_code",
    "operation",
    "error_code",
    "error",
    "metadata",
];

/// `GET /1.0/profiles`
///
/// # Errors
/// Those of the engine.
pub async fn list(call: Call) -> Result<Reply> {
    let recursion = call.query.recursion()?;
    let filter = Filter::parse(call.query.get("filter"))?;
    let projects: Vec<String> = if call.query.flag("all-projects") {
        call.engine().projects(&call.context).iter().map(|p| p.name.to_string()).collect()
    } else {
        vec![call.project().to_owned()]
    };
    let mut found = vec![];
    for project in projects {
        for profile in call.engine().profiles(&call.context, &project)? {
            // What projects share is listed once.
            let owner = call.engine().inner().project_name(Some(profile.project));
            if owner == project || !call.query.flag("all-projects") {
                found.push((profile, owner));
            }
        }
    }
    respond_list(
        recursion,
        &filter,
        found.iter().map(|(p, project)| {
            (
                ProfileView::of(p, call.engine().profile_used_by(&call.context, p), project),
                wire::path("profiles", &p.name, project),
            )
        }),
    )
}

/// `GET /1.0/profiles/{name}`
///
/// # Errors
/// Those of the engine.
pub async fn get(call: Call) -> Result<Reply> {
    let profile = call.engine().profile(&call.context, call.project(), call.param(0))?;
    let project = call.engine().inner().project_name(Some(profile.project));
    let view = ProfileView::of(&profile, call.engine().profile_used_by(&call.context, &profile), &project);
    sync_etag(&view, &Etag::of(VIEW, profile.id.uuid(), profile.spec_version))
}

/// `POST /1.0/profiles`
///
/// # Errors
/// Those of the engine.
pub async fn create(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let name = f.need_text("name")?;
    let request = UpdateProfile {
        description: f.text("description")?.unwrap_or_default(),
        config: f.config("config")?.unwrap_or_default(),
        devices: f.devices("devices")?.unwrap_or_default(),
        if_version: None,
    };
    f.finish(&["used_by", "project"])?;
    call.engine().profile_create(&call.context, call.project(), &name, request).await?;
    created(&wire::path("profiles", &name, call.project()))
}

/// `PUT` and `PATCH /1.0/profiles/{name}`
///
/// # Errors
/// Those of the engine.
pub async fn change(call: Call) -> Result<Reply> {
    let profile = call.engine().profile(&call.context, call.project(), call.param(0))?;
    let if_version = call.expected(VIEW, profile.id.uuid(), profile.spec_version)?;
    let patch = call.request.method() == hyper::Method::PATCH;
    let (call, mut f) = call.fields().await?;
    let mut request = if patch {
        UpdateProfile {
            description: profile.description.clone(),
            config: profile.config.clone(),
            devices: profile.devices.clone(),
            if_version: if_version.or(Some(profile.spec_version)),
        }
    } else {
        UpdateProfile {
            description: String::new(),
            config: Default::default(),
            devices: Default::default(),
            if_version,
        }
    };
    if let Some(text) = f.text("description")? {
        request.description = text;
    }
    request.config.extend(f.config("config")?.unwrap_or_default());
    request.devices.extend(f.devices("devices")?.unwrap_or_default());
    f.finish(READ_ONLY)?;
    call.engine().profile_update(&call.context, call.project(), call.param(0), request).await?;
    Ok(empty())
}

/// `POST /1.0/profiles/{name}`: rename.
///
/// # Errors
/// Those of the engine.
pub async fn rename(call: Call) -> Result<Reply> {
    let (call, mut f) = call.fields().await?;
    let new = f.need_text("name")?;
    f.finish(&[])?;
    call.engine().profile_rename(&call.context, call.project(), call.param(0), &new).await?;
    created(&wire::path("profiles", &new, call.project()))
}

/// `DELETE /1.0/profiles/{name}`
///
/// # Errors
/// Those of the engine.
pub async fn delete(call: Call) -> Result<Reply> {
    call.engine().profile_delete(&call.context, call.project(), call.param(0)).await?;
    Ok(empty())
}
