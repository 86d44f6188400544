//! The API extensions that are announced. Each is here because a test exercises it; `incus` 6.0.4 and `lxc` 5.0.2 refuse
//! commands, or fall back to older calls, without some of them.

/// Announced extensions and the test that exercises each.
pub const TESTED: &[(&str, &str)] = &[
    ("api_filtering", "lists_filter_and_recurse"),
    ("certificate_description", "certificates_live"),
    ("certificate_project", "certificates_live"),
    ("certificate_token", "certificates_live"),
    ("certificate_update", "certificates_live"),
    ("clustering", "server_describes_itself"),
    ("console", "console_joins_both_ways"),
    ("container_exec_signal_handling", "exec_resizes_and_signals"),
    ("container_exec_user_group_cwd", "exec_carries_user_group_and_directory"),
    ("container_full", "lists_filter_and_recurse"),
    ("container_stop_priority", "power_changes_are_operations"),
    ("custom_block_volumes", "custom_volumes_live"),
    ("directory_manipulation", "files_over_http"),
    ("entity_description", "instances_are_changed_under_their_etag"),
    ("etag", "instances_are_changed_under_their_etag"),
    ("event_lifecycle", "events_tell_what_happened"),
    ("event_lifecycle_name_and_project", "events_tell_what_happened"),
    ("event_location", "events_tell_what_happened"),
    ("event_project", "events_tell_what_happened"),
    ("file_append", "files_over_http"),
    ("file_delete", "files_over_http"),
    ("file_get_symlink", "files_over_http"),
    ("file_symlinks", "files_over_http"),
    ("image_types", "images_are_uploaded_listed_and_exported"),
    ("images_all_projects", "images_are_uploaded_listed_and_exported"),
    ("instance_all_projects", "lists_filter_and_recurse"),
    ("instance_bulk_state_change", "power_changes_are_operations"),
    ("instance_create_start", "an_instance_is_launched_in_one_operation"),
    ("instance_file_head", "files_over_http"),
    ("instance_get_full", "lists_filter_and_recurse"),
    ("instances", "lists_filter_and_recurse"),
    ("instances_state_total", "lists_filter_and_recurse"),
    ("karst_host", "karst_paths_answer"),
    ("karst_images_build", "karst_paths_answer"),
    ("karst_tokens", "tokens_are_shown_with_each_request"),
    ("metadata_configuration", "server_describes_itself"),
    ("network", "networks_live_and_are_refused"),
    ("network_leases", "networks_live_and_are_refused"),
    ("network_state", "networks_live_and_are_refused"),
    ("operation_description", "power_changes_are_operations"),
    ("operation_wait", "power_changes_are_operations"),
    ("operations_get_query_all_projects", "power_changes_are_operations"),
    ("patch", "instances_are_changed_under_their_etag"),
    ("profile_usedby", "profiles_and_projects_live"),
    ("profiles_all_projects", "profiles_and_projects_live"),
    ("project_usage", "profiles_and_projects_live"),
    ("projects", "profiles_and_projects_live"),
    ("resources", "storage_pools_live"),
    ("server_supported_storage_drivers", "server_describes_itself"),
    ("storage", "storage_pools_live"),
    ("shared_custom_block_volumes", "custom_volumes_live"),
    ("storage_api_volume_rename", "custom_volumes_live"),
    ("storage_volume_api_filtering", "storage_pools_live"),
    ("storage_volume_state", "storage_pools_live"),
    ("storage_volumes_all_projects", "storage_pools_live"),
    ("virtual-machines", "an_instance_is_launched_in_one_operation"),
    ("warnings", "server_describes_itself"),
];

/// Their names.
pub const EXTENSIONS: [&str; TESTED.len()] = {
    let mut names = [""; TESTED.len()];
    let mut i = 0;
    while i < names.len() {
        names[i] = TESTED[i].0;
        i += 1;
    }
    names
};
